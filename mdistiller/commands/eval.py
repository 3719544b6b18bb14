"""Score a network on a data set's validation images: top-1, top-5, loss, speed and cost.

    mdistiller eval -m resnet32x4                                    # the published teacher, on CIFAR-100
    mdistiller eval -m resnet8 -d digits -c output/digits/kd,wrn_16_2,resnet8/student_best
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from ..console import one_line_errors
from ..dataset import dataset_info, get_val_loader
from ..engine.build import load_trained
from ..engine.scores import evaluate, model_heads
from ..models.cost import network_cost
from ._arguments import check_batch_size, command_parser, trained_network_arguments


def evaluate_checkpoint(
    model: str,
    ckpt: str,
    dataset: str,
    batch_size: int,
    head: str | None = None,
    groups: str = "",
    data_root: str = "./data",
    num_workers: int = 2,
    device: str = "auto",
) -> str:
    """Score a trained network on a data set's validation images.

    Args:
        ckpt: its checkpoint, or "pretrain" for the published one.
        groups: for a plain network that DCGD trained with groups, DCGD.GROUPS of its run.

    Returns:
        A line for each head, then the speed and the network's cost.

    Raises:
        UserError: an unknown name, missing data, a checkpoint that does not fit, a batch size below 1.
    """
    check_batch_size(batch_size)
    net = load_trained(dataset, model, ckpt, groups, device)
    heads = model_heads(net, head)
    where = next(net.parameters()).device
    loader = get_val_loader(dataset, data_root, batch_size, num_workers).to(where)
    started = time.perf_counter()
    scores = evaluate(loader, heads, where)
    seconds = time.perf_counter() - started
    images = len(loader.targets)
    lines = [
        f"{name + ' head: ' if name else ''}top-1 {s.top1:.2f}, top-5 {s.top5:.2f}, loss {s.loss:.4f}"
        for name, s in scores.items()
    ]
    lines.append(f"{images} images in {seconds:.1f} s, {images / seconds:.0f} images/s on {where}")
    size = dataset_info[dataset].image_size
    lines.append(f"{model}: {network_cost(net, size)} at {size}x{size}")
    return "\n".join(lines)


def parse_args(arguments: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = command_parser(__doc__, prog)
    trained_network_arguments(parser, batch_size=64)
    parser.add_argument("--head", help="for a network with several heads: the one to score (default: all)")
    parser.add_argument(
        "--groups", default="", help="for a plain network that DCGD trained with groups: DCGD.GROUPS of its run"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    with one_line_errors():
        print(evaluate_checkpoint(**vars(parse_args(arguments, prog))))
