"""The original's `engine/utils.py`: its names, where they are now."""

from __future__ import annotations

from .checkpoint import load_checkpoint, save_checkpoint
from .evaluate import accuracy, validate
from .trainer import learning_rate

__all__ = ["accuracy", "adjust_learning_rate", "load_checkpoint", "save_checkpoint", "validate"]


def adjust_learning_rate(epoch, cfg, optimizer):
    """Set and return the learning rate of `epoch` (from 1)."""
    lr = learning_rate(epoch, cfg)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
