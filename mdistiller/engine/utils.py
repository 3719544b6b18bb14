"""The original's `engine/utils.py`: its names, for code that was written for it."""

from __future__ import annotations

from .files.checkpoint import load_checkpoint, save_checkpoint
from .lr_schedule import adjust_learning_rate
from .scores import accuracy, validate

__all__ = [
    "AverageMeter", "accuracy", "adjust_learning_rate", "load_checkpoint", "log_msg", "save_checkpoint", "validate",
]  # fmt: skip

_COLOURS = {"INFO": 36, "TRAIN": 32, "EVAL": 31}


class AverageMeter:
    """The mean of numbers that come one by one, each with a weight. The trainer itself uses `Meters`.

    Attributes:
        val: the latest number.
        sum, count: of the numbers times their weights, and of the weights.
        avg: sum / count.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start again from nothing."""
        self.val = self.avg = self.sum = 0.0
        self.count = 0

    def update(self, val: float, n: int = 1) -> None:
        """Take in the number `val`, which stands for `n` of them."""
        self.val = val
        self.sum += val * n
        self.count += n
        self.avg = self.sum / self.count


def log_msg(msg: str, mode: str = "INFO") -> str:
    """`[mode] msg` in the colour that a terminal shows for "INFO" (cyan), "TRAIN" (green) or "EVAL" (red)."""
    return f"\033[{_COLOURS[mode]}m[{mode}] {msg}\033[0m"
