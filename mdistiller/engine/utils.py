"""The original's `engine/utils.py`: its names, where they are now."""

from __future__ import annotations

from .files.checkpoint import load_checkpoint, save_checkpoint
from .lr_schedule import adjust_learning_rate
from .scores import accuracy, validate

__all__ = ["accuracy", "adjust_learning_rate", "load_checkpoint", "save_checkpoint", "validate"]
