"""Configuration, training loop, evaluation, checkpoints and logs."""

from .trainer import CRDDOT, DOT, BaseTrainer, CRDTrainer, trainer_dict

__all__ = ["CRDDOT", "DOT", "BaseTrainer", "CRDTrainer", "trainer_dict"]
