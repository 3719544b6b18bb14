"""Score a network on a data set's validation images: top-1, top-5, loss, speed and cost.

    mdistiller eval -m resnet32x4                                    # the published teacher, on CIFAR-100
    mdistiller eval -m resnet8 -d digits -c output/digits/kd,wrn_16_2,resnet8/student_best

Without -m, config.yaml next to the checkpoint says which network the run deploys, and on which data set.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch.nn as nn
from torch import Tensor
from yacs.config import CfgNode as CN

from ..arguments import PathArgument
from ..console import tool
from ..dataset import get_val_loader, info_of
from ..engine.build import load_deployed, load_trained, own_view
from ..engine.cfg import elsewhere, settings_for
from ..engine.files.checkpoint import check_file_classes
from ..engine.scores import Heads, evaluate, model_heads
from ..errors import UserError
from ..models.cost import network_cost
from ..registry import unknown_name
from ._arguments import (
    check_batch_size,
    check_labelled,
    command_parser,
    options_for_settings,
    trained_network_arguments,
)


def evaluate_checkpoint(
    model: str | None,
    ckpt: str,
    dataset: str | None,
    batch_size: int,
    head: str | None = None,
    groups: str = "",
    data_root: str | None = None,
    num_workers: int = 2,
    device: str = "auto",
    skip_broken: bool = False,
) -> str:
    """Score a trained network on a data set's validation images.

    Args:
        model: its name; None for what the run deploys, by the config.yaml beside `ckpt`.
        ckpt: its checkpoint, or "pretrain" for the published one.
        dataset: cifar100 by default or, without `model`, that of the run.
        data_root: the data set's folder; None: ./data or, without `model`, that of the run.
        groups: for a plain network that DCGD trained with groups, DCGD.GROUPS of its run.
        skip_broken: leave out images that cannot be read.

    Returns:
        A line for each head, then the speed and the network's cost.

    Raises:
        UserError: an unknown name, missing data, a checkpoint that does not fit, a batch size below 1.
    """
    check_batch_size(batch_size)
    networks: dict[str, nn.Module]
    if model is None:
        networks, heads, cfg = _deployed(ckpt, head, dataset, groups, data_root, device)
        info = info_of(cfg)
        check_labelled(info, cfg.DATASET.TYPE)
    else:
        cfg = settings_for(dataset or "cifar100", data_root, model)
        info = info_of(cfg)
        check_labelled(info, cfg.DATASET.TYPE)
        info = own_view(info, model, ckpt)
        net = load_trained(info, model, ckpt, groups, device)
        networks, heads = {model: net}, model_heads(net, head)
    where = next(next(iter(networks.values())).parameters()).device
    loader = get_val_loader(info, cfg.DATASET.ROOT, batch_size, num_workers, skip_broken=skip_broken).to(where)
    if ckpt != "pretrain":
        check_file_classes(ckpt, loader.class_names)
    started = time.perf_counter()
    scores = evaluate(loader, heads, where)
    seconds = time.perf_counter() - started
    images = len(loader.targets) - len(getattr(loader, "broken", ()))
    lines = [
        f"{name + ' head: ' if name else ''}top-1 {s.top1:.2f}, top-5 {s.top5:.2f}, loss {s.loss:.4f}"
        for name, s in scores.items()
    ]
    lines.append(f"{images} images in {seconds:.1f} s, {images / seconds:.0f} images/s on {where}")
    size = info.image_size
    lines += [f"{name}: {network_cost(net, size)} at {size}x{size}" for name, net in networks.items()]
    return "\n".join(lines)


def _deployed(
    ckpt: str, head: str | None, dataset: str | None, groups: str, data_root: str | None, device: str
) -> tuple[dict[str, nn.Module], Heads, CN]:
    """What the run of a checkpoint deploys, by name; the logits of its heads (or of `head`); its settings."""
    if ckpt == "pretrain":
        raise UserError(
            "name the network, such as -m resnet20, or a run's checkpoint, such as -c output/.../student_best"
        )
    if groups:
        raise UserError("--groups goes with -m; without -m, the run's config.yaml says the groups")
    distiller, names, cfg = load_deployed(Path(ckpt), device)
    if dataset not in (None, cfg.DATASET.TYPE):
        raise UserError(f"{ckpt} was trained on {cfg.DATASET.TYPE}, not on {dataset}; leave out -d, or name -m")
    cfg = cfg if data_root is None else elsewhere(cfg, data_root)
    networks = {name: network for name, network in distiller.deployments().items() if name in names}
    if len(distiller.deployments()) == 1:
        if head is not None:
            raise UserError(f"{ckpt} has one head; leave out --head {head}")
        return networks, distiller.forward_heads, cfg
    if head is not None and head not in names:
        raise unknown_name(f"head of {ckpt}", head, names)
    scored = names if head is None else [head]

    def heads(image: Tensor) -> dict[str, Tensor]:
        logits = distiller.forward_heads(image)
        return {name: logits[name] for name in scored}

    return networks, heads, cfg


def parse_args(arguments: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = command_parser(__doc__, prog)
    trained_network_arguments(parser, batch_size=64, of_run=True)
    parser.add_argument("--head", help="for a network with several heads: the one to score (default: all)")
    parser.add_argument(
        "--groups", action=PathArgument, default="",
        help="for a plain network that DCGD trained with groups: DCGD.GROUPS of its run",
    )  # fmt: skip
    return parser.parse_args(arguments)


@tool()
@options_for_settings()
def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    print(evaluate_checkpoint(**vars(parse_args(arguments, prog))))
