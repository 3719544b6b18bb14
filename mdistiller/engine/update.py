"""How losses become a step: the only place that calls `backward()` and `step()`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
import torch.nn as nn
from torch import Tensor
from torch.optim import Optimizer
from yacs.config import CfgNode as CN

from ..errors import UserError
from ..registry import Registry
from .dot import DistillationOrientedTrainer

# SOLVER.TYPE -> function of (parameters, cfg.SOLVER), for one gradient and for DOT's two.
optimizer_dict = Registry("SOLVER.TYPE")
dot_optimizer_dict = Registry("SOLVER.TYPE for the DOT trainers")

# The losses that are the task's; whatever else a distiller returns is distillation.
TASK_LOSSES = ("ce", "loss_ce")


@optimizer_dict.register("SGD")
def sgd(parameters: Iterable[nn.Parameter], solver: CN) -> Optimizer:
    """SGD with LR, MOMENTUM and WEIGHT_DECAY."""
    return torch.optim.SGD(parameters, lr=solver.LR, momentum=solver.MOMENTUM, weight_decay=solver.WEIGHT_DECAY)


@dot_optimizer_dict.register("SGD")
def dot_sgd(parameters: Iterable[nn.Parameter], solver: CN) -> DistillationOrientedTrainer:
    """DOT with momentum MOMENTUM - DELTA for the task and MOMENTUM + DELTA for the distillation.

    Raises:
        UserError: one of the two is outside [0, 1).
    """
    momenta = {"momentum": solver.MOMENTUM - solver.DOT.DELTA, "momentum_kd": solver.MOMENTUM + solver.DOT.DELTA}
    if not all(0 <= m < 1 for m in momenta.values()):
        raise UserError(
            f"SOLVER.DOT.DELTA {solver.DOT.DELTA} takes the momenta SOLVER.MOMENTUM -+ DELTA out of [0, 1) "
            f"at SOLVER.MOMENTUM {solver.MOMENTUM}; take a smaller DELTA"
        )
    return DistillationOrientedTrainer(parameters, lr=solver.LR, weight_decay=solver.WEIGHT_DECAY, **momenta)


class SumUpdate:
    """One step down the sum of the losses.

    Args:
        parameters: what is trained.
        cfg: the whole configuration tree; its SOLVER says how.

    Raises:
        UserError: no such SOLVER.TYPE.
    """

    optimizers: ClassVar[Registry] = optimizer_dict

    def __init__(self, parameters: Iterable[nn.Parameter], cfg: CN) -> None:
        self.optimizer: Optimizer = self.optimizers[cfg.SOLVER.TYPE](parameters, cfg.SOLVER)

    def __call__(self, losses: dict[str, Tensor]) -> Tensor:
        """Step; returns the total () without its graph. A loss that is no scalar counts with its mean."""
        total = _total(losses.values())
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        self.optimizer.step()
        return total.detach()


class DotUpdate(SumUpdate):
    """One step of DOT: the losses "ce" and "loss_ce" are the task, all others the distillation. arXiv 2304.08827."""

    optimizers = dot_optimizer_dict
    optimizer: DistillationOrientedTrainer

    def __call__(self, losses: dict[str, Tensor]) -> Tensor:
        """Step, with a backward pass for each part; returns the total () without its graph.

        Raises:
            UserError: one of the parts has no loss.
        """
        task = [loss for name, loss in losses.items() if name in TASK_LOSSES]
        distillation = [loss for name, loss in losses.items() if name not in TASK_LOSSES]
        if not (task and distillation):
            raise UserError(
                f"DOT needs a task loss ({' or '.join(TASK_LOSSES)}) and a distillation loss, this method has only "
                f"{', '.join(losses)}; use SOLVER.TRAINER base"
            )
        loss_task, loss_kd = _total(task), _total(distillation)
        self.optimizer.zero_grad(set_to_none=True)
        loss_kd.backward(retain_graph=True)
        self.optimizer.step_kd()
        loss_task.backward()
        self.optimizer.step()
        return (loss_task + loss_kd).detach()


def _total(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack([loss.mean() for loss in losses]).sum()
