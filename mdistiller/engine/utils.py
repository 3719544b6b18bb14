"""The names of the original's `engine/utils.py`, for code that was written for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch.nn as nn
from tqdm import tqdm

from ..dataset.batch import labelled
from .files.checkpoint import load_checkpoint, save_checkpoint
from .lr_schedule import adjust_learning_rate
from .scores import accuracy, evaluate_distiller

__all__ = [
    "AverageMeter", "accuracy", "adjust_learning_rate", "load_checkpoint", "log_msg", "save_checkpoint", "validate",
]  # fmt: skip

_COLOURS = {"INFO": 36, "TRAIN": 32, "EVAL": 31}


class AverageMeter:
    """The running weighted mean of numbers. The trainer itself uses `Meters`.

    Attributes:
        val: the latest number.
        sum: the sum of the numbers times their weights.
        count: the sum of the weights.
        avg: sum / count.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all numbers."""
        self.val = self.avg = self.sum = 0.0
        self.count = 0

    def update(self, val: float, n: int = 1) -> None:
        """Add the number `val` with the weight `n`."""
        self.val = val
        self.sum = self.sum + val * n  # not in place: it may be a tensor
        self.count += n
        self.avg = self.sum / self.count


def log_msg(msg: str, mode: str = "INFO") -> str:
    """`[mode] msg` with the terminal's colour codes: "INFO" is cyan, "TRAIN" green, "EVAL" red."""
    return f"\033[{_COLOURS[mode]}m[{mode}] {msg}\033[0m"


def validate(val_loader: Iterable[Any], distiller: nn.Module) -> tuple[float, float, float]:
    """(top-1 in percent, top-5 in percent, cross-entropy) of a distiller's first head, with a progress bar."""
    plain: Any = getattr(distiller, "module", distiller)
    with tqdm(total=len(val_loader) if isinstance(val_loader, Sized) else None) as bar:

        def batches() -> Iterator[dict[str, Any]]:
            for image, target in labelled(val_loader):
                yield {"image": image, "target": target}
                bar.update()

        score = next(iter(evaluate_distiller(batches(), plain).values()))
        bar.set_description(log_msg(f"Top-1:{score.top1:.3f}| Top-5:{score.top5:.3f}", "EVAL"))
    return score.top1, score.top5, score.loss
