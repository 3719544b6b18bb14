"""The names of the original's `engine/utils.py`, for code that was written for it."""

from __future__ import annotations

from .files.checkpoint import load_checkpoint, save_checkpoint
from .lr_schedule import adjust_learning_rate
from .scores import accuracy, validate

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
        self.sum += val * n
        self.count += n
        self.avg = self.sum / self.count


def log_msg(msg: str, mode: str = "INFO") -> str:
    """`[mode] msg` with the terminal's colour codes: "INFO" is cyan, "TRAIN" green, "EVAL" red."""
    return f"\033[{_COLOURS[mode]}m[{mode}] {msg}\033[0m"
