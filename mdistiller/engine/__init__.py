"""Configuration, training loop, evaluation, checkpoints and logs."""

from .trainer import trainer_dict

__all__ = ["trainer_dict"]
