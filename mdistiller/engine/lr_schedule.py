"""The learning rate, computed from the epoch and the step alone, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from yacs.config import CfgNode as CN

from ..models.parameters import Group
from ..registry import Registry

# The key of a parameter group's own factor of the learning rate.
LR_SCALE = "lr_scale"

# SOLVER.LR_SCHEDULE -> function of (epochs done, cfg.SOLVER): the learning rate.
schedule_dict = Registry("SOLVER.LR_SCHEDULE")


@schedule_dict.register("step")
def step_schedule(done: float, solver: CN) -> float:
    """The original's schedule: LR times LR_DECAY_RATE for every stage of LR_DECAY_STAGES that has passed."""
    return solver.LR * solver.LR_DECAY_RATE ** sum(done >= stage for stage in solver.LR_DECAY_STAGES)


@schedule_dict.register("cosine")
def cosine_schedule(done: float, solver: CN) -> float:
    """From LR after the warm-up down to LR_MIN at the end, along half a cosine. arXiv 1608.03983, without restarts."""
    share = (done - solver.WARMUP_EPOCHS) / max(solver.EPOCHS - solver.WARMUP_EPOCHS, 1)
    return solver.LR_MIN + (solver.LR - solver.LR_MIN) * (1 + math.cos(math.pi * min(max(share, 0), 1))) / 2


def learning_rate(epoch: int, cfg: CN, step: int = 0, steps: int = 1) -> float:
    """The learning rate of `step` (from 0) of the `steps` of `epoch` (from 1).

    During the warm-up, the schedule's value times the fraction of the warm-up done after this step. arXiv 1706.02677.
    """
    solver = cfg.SOLVER
    lr = schedule_dict[solver.LR_SCHEDULE](epoch - 1 + step / steps, solver)
    if epoch <= solver.WARMUP_EPOCHS:
        lr *= (epoch - 1 + (step + 1) / steps) / solver.WARMUP_EPOCHS
    return lr


def adjust_learning_rate(epoch: int, cfg: CN, optimizer: torch.optim.Optimizer, step: int = 0, steps: int = 1) -> float:
    """Set and return the `learning_rate`; a parameter group with an `LR_SCALE` gets it times that."""
    lr = learning_rate(epoch, cfg, step, steps)
    for group in optimizer.param_groups:
        own = lr * group[LR_SCALE] if LR_SCALE in group else lr
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(own)  # a CUDA graph reads it where it is
        else:
            group["lr"] = own
    return lr


def scaled_groups(groups: Iterable[Group], solver: CN) -> list[Group]:
    """The parameter groups; one with an "lr" of its own keeps, as its `LR_SCALE`, the ratio of that to SOLVER.LR."""
    return [{**group, LR_SCALE: group["lr"] / solver.LR} if "lr" in group else group for group in groups]
