"""How losses become a step: the only place that calls `backward()` and `step()`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor
from torch.optim import Optimizer
from yacs.config import CfgNode as CN

from ..distributed.gather import mean_over_ranks
from ..errors import UserError
from ..registry import Registry
from .dot import DistillationOrientedTrainer
from .optimizers import dot_optimizer_dict, optimizer_dict

# The losses that are the task's; whatever else a distiller returns is distillation.
TASK_LOSSES = ("ce", "loss_ce")



class SumUpdate:
    """One step down the sum of the losses: `backward` for every part of the batch, then `step`.

    Args:
        parameters: what is trained.
        cfg: the whole configuration tree; its SOLVER says how.

    Raises:
        UserError: no such SOLVER.TYPE, or a SOLVER setting that this update cannot take.
    """

    optimizers: ClassVar[Registry] = optimizer_dict
    # Whether DistributedDataParallel averages the gradients over the ranks during the backward pass.
    one_backward: ClassVar[bool] = True

    def __init__(self, parameters: Iterable[nn.Parameter], cfg: CN) -> None:
        self.parameters = list(parameters)
        self.optimizer: Optimizer = self.optimizers[cfg.SOLVER.TYPE](self.parameters, cfg.SOLVER)
        self.max_norm = cfg.SOLVER.CLIP_GRAD_NORM
        self.scaler: torch.amp.GradScaler | None = None
        if cfg.SOLVER.AMP == "fp16":
            self.scaler = torch.amp.GradScaler(self.parameters[0].device.type if self.parameters else "cpu")

    def __call__(self, losses: dict[str, Tensor]) -> Tensor:
        """Step; returns the total () without its graph. A loss that is no scalar counts with its mean."""
        total = self.backward(losses)
        self.step()
        return total

    def backward(self, losses: dict[str, Tensor], weight: float = 1.0) -> Tensor:
        """Add the gradients of the losses' sum, times `weight`, to those there are; returns the sum, unweighted."""
        total = _total(losses.values())
        weighted = total * weight if weight != 1 else total
        (self.scaler.scale(weighted) if self.scaler else weighted).backward()
        return total.detach()

    def step(self, measure: bool = False) -> Tensor | None:
        """Move the parameters by the gradients and drop these; returns the gradients' L2 norm () if `measure`d."""
        norm = None
        if measure or self.max_norm:
            if self.scaler:
                self.scaler.unscale_(self.optimizer)
            norm = self._norm()
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.drop()
        return norm

    def drop(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def _norm(self) -> Tensor:
        """Of the gradients before they are cut, if they are."""
        return torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm or float("inf"))

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes: the optimizer's state, and the loss scale of fp16."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict() if self.scaler else {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state.

        Raises:
            ValueError, KeyError: it is that of other parameters.
        """
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler and state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])


class DotUpdate(SumUpdate):
    """One step of DOT: the losses "ce" and "loss_ce" are the task, all others the distillation. arXiv 2307.08436."""

    optimizers = dot_optimizer_dict
    optimizer: DistillationOrientedTrainer
    one_backward = False

    def __init__(self, parameters: Iterable[nn.Parameter], cfg: CN) -> None:
        for key, off, reason in (
            ("ACCUMULATE", 1, "keeps the two gradients of one batch"),
            ("CLIP_GRAD_NORM", 0, "has two gradients, and no norm of both is defined"),
        ):
            if cfg.SOLVER[key] != off:
                raise UserError(f"SOLVER.{key} {cfg.SOLVER[key]}: DOT {reason}; set it to {off}")
        if cfg.SOLVER.AMP == "fp16":
            raise UserError("SOLVER.AMP fp16 scales one gradient, DOT has two; take bf16 or fp16-teacher")
        super().__init__(parameters, cfg)

    def backward(self, losses: dict[str, Tensor], weight: float = 1.0) -> Tensor:
        """A backward pass for each part; returns the total () without its graph.

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
        loss_kd.backward(retain_graph=True)
        self._average()
        self.optimizer.step_kd()
        loss_task.backward()
        self._average()
        return (loss_task + loss_kd).detach()

    def _average(self) -> None:
        """The mean gradient over the ranks, where there are several."""
        for p in self.parameters:
            if p.grad is not None:
                mean_over_ranks(p.grad)

    def _norm(self) -> Tensor:
        """Of the sum of both gradients."""
        return torch.stack(torch._foreach_norm(self.optimizer.gradients())).norm()

    def drop(self) -> None:
        self.optimizer.drop_kd()
        super().drop()


def _total(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack([loss.mean() for loss in losses]).sum()
