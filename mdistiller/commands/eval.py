"""What `tools/eval.py` says of a network."""

from __future__ import annotations

import time

from ..dataset import dataset_info, get_val_loader
from ..engine.build import build_pretrained
from ..engine.runtime.device import pick_device
from ..engine.scores import evaluate, model_heads
from ..errors import UserError
from ..models.cost import network_cost


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
        groups: of a plain network that DCGD grouped: what DCGD.GROUPS was.

    Returns:
        A line for each head, then what the network costs.

    Raises:
        UserError: an unknown name, missing data, an unfit checkpoint, a batch size below 1.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size must be a whole number >= 1, not {batch_size}")
    info = dataset_info[dataset]
    where = pick_device(device)
    path = "" if ckpt == "pretrain" else ckpt
    net = build_pretrained(dataset, model, info.num_classes, path, groups).to(where).eval()
    heads = model_heads(net, head)
    loader = get_val_loader(dataset, data_root, batch_size, num_workers)
    started = time.perf_counter()
    scores = evaluate(loader.to(where) if hasattr(loader, "to") else loader, heads, where)
    seconds = time.perf_counter() - started
    images = len(loader.targets)
    lines = [
        f"{name + ' head: ' if name else ''}top-1 {s.top1:.2f}, top-5 {s.top5:.2f}, loss {s.loss:.4f}"
        for name, s in scores.items()
    ]
    lines.append(f"{images} images in {seconds:.1f} s, {images / seconds:.0f} images/s on {where}")
    lines.append(f"{model}: {network_cost(net, info.image_size)} at {info.image_size}x{info.image_size}")
    return "\n".join(lines)
