"""The original's `engine/utils.py`: its names, where they are now."""

from __future__ import annotations

from .checkpoint import load_checkpoint, save_checkpoint
from .evaluate import accuracy, validate
from .schedule import adjust_learning_rate

__all__ = ["accuracy", "adjust_learning_rate", "load_checkpoint", "save_checkpoint", "validate"]
