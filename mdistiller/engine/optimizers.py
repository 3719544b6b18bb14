"""The optimizers by their SOLVER.TYPE."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn as nn
from torch.optim import Optimizer
from yacs.config import CfgNode as CN

from ..errors import UserError
from ..registry import Registry
from .dot import DistillationOrientedTrainer

# SOLVER.TYPE -> function of (parameters, cfg.SOLVER), for one gradient and for DOT's two.
optimizer_dict = Registry("SOLVER.TYPE")
dot_optimizer_dict = Registry("SOLVER.TYPE for the DOT trainers")


@optimizer_dict.register("SGD")
def sgd(parameters: Sequence[nn.Parameter], solver: CN) -> Optimizer:
    """SGD with LR, MOMENTUM and WEIGHT_DECAY."""
    return torch.optim.SGD(
        parameters, lr=solver.LR, momentum=solver.MOMENTUM, weight_decay=solver.WEIGHT_DECAY, fused=_fused(parameters)
    )


@optimizer_dict.register("AdamW")
def adamw(parameters: Sequence[nn.Parameter], solver: CN) -> Optimizer:
    """AdamW with LR, BETAS and WEIGHT_DECAY. arXiv 1711.05101."""
    betas = tuple(solver.BETAS)
    return torch.optim.AdamW(
        parameters, lr=solver.LR, betas=betas, weight_decay=solver.WEIGHT_DECAY, fused=_fused(parameters)
    )


def _fused(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether to run the whole step in one kernel: on a GPU. On the CPU this is not faster, and rounds differently."""
    return bool(parameters) and all(p.is_cuda for p in parameters)


@dot_optimizer_dict.register("SGD")
def dot_sgd(parameters: Iterable[nn.Parameter], solver: CN) -> DistillationOrientedTrainer:
    """DOT with momentum MOMENTUM - DELTA for the task and MOMENTUM + DELTA for the distillation.

    Raises:
        UserError: one of the two is outside [0, 1).
    """
    momenta = {"momentum": solver.MOMENTUM - solver.DOT.DELTA, "momentum_kd": solver.MOMENTUM + solver.DOT.DELTA}
    if not all(0 <= m < 1 for m in momenta.values()):
        raise UserError(
            f"SOLVER.DOT.DELTA {solver.DOT.DELTA}: SOLVER.MOMENTUM {solver.MOMENTUM} minus and plus DELTA must both be "
            "in [0, 1); take a smaller DELTA"
        )
    return DistillationOrientedTrainer(parameters, lr=solver.LR, weight_decay=solver.WEIGHT_DECAY, **momenta)
