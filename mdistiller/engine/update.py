"""Update rules: how losses change the parameters. Only this module calls `backward()` and `step()`."""

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
from ..models.parameters import Learnable, flat_parameters, parameter_groups
from ..registry import Registry
from .dot import DistillationOrientedTrainer
from .lr_schedule import scaled_groups
from .optimizers import dot_optimizer_dict, load_optimizer_state, optimizer_dict

# Names of the task losses; all other losses of a distiller are distillation losses.
TASK_LOSSES = ("ce", "loss_ce", "loss_multi_ce")


class SumUpdate:
    """One step on the sum of the losses: `backward` for every micro-batch, then `step`.

    Args:
        learnable: the parameters to train; also groups of them, as torch.optim takes them, whose settings replace those
            of SOLVER. A group's own "lr" follows the schedule in proportion to SOLVER.LR.
        cfg: the whole configuration tree; its SOLVER section is used.

    Attributes:
        parameters: all of them, without their groups.

    Raises:
        UserError: no such SOLVER.TYPE, or a SOLVER setting that this update does not support.
        ValueError: see `flat_parameters`.
    """

    optimizers: ClassVar[Registry] = optimizer_dict
    # Whether DistributedDataParallel averages the gradients over the ranks during the backward pass.
    one_backward: ClassVar[bool] = True

    def __init__(self, learnable: Learnable, cfg: CN) -> None:
        groups = scaled_groups(parameter_groups(learnable), cfg.SOLVER)
        self.parameters = flat_parameters(groups)
        self.optimizer: Optimizer = self.optimizers[cfg.SOLVER.TYPE](groups, cfg.SOLVER)
        self.max_norm = cfg.SOLVER.CLIP_GRAD_NORM
        self.scaler: torch.amp.GradScaler | None = None
        if cfg.SOLVER.AMP == "fp16":
            self.scaler = torch.amp.GradScaler(self.parameters[0].device.type if self.parameters else "cpu")

    def __call__(self, losses: dict[str, Tensor]) -> Tensor:
        """One step; returns the total loss () without its graph. The mean is taken of a loss that is not a scalar."""
        total = self.backward(losses)
        self.step()
        return total

    def backward(self, losses: dict[str, Tensor], weight: float = 1.0) -> Tensor:
        """Accumulate the gradients of `weight` times the sum of the losses; returns the unweighted sum ()."""
        total = _total(losses.values())
        weighted = total * weight if weight != 1 else total
        (self.scaler.scale(weighted) if self.scaler else weighted).backward()
        return total.detach()

    def step(self, measure: bool = False) -> Tensor | None:
        """Update the parameters and drop the gradients; returns the gradients' L2 norm () if `measure`."""
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

    def without_gradient(self) -> list[nn.Parameter]:
        """The parameters that the backward passes since the last step gave no gradient; zero is one."""
        return [p for p in self.parameters if p.grad is None]

    def drop(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def _norm(self) -> Tensor:
        """The gradients' L2 norm () before clipping; clips them if CLIP_GRAD_NORM is set."""
        return torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm or float("inf"))

    def state_dict(self) -> dict[str, Any]:
        """The state for `load_state_dict`: the optimizer's, and the loss scale of fp16."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict() if self.scaler else {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state; the settings stay those of this run, see `load_optimizer_state`.

        Raises:
            ValueError, KeyError: the state belongs to other parameters.
        """
        load_optimizer_state(self.optimizer, state["optimizer"])
        if self.scaler and state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])


class DotUpdate(SumUpdate):
    """One step of DOT: "ce" and "loss_ce" are task losses, all others distillation losses. arXiv 2307.08436."""

    optimizers = dot_optimizer_dict
    optimizer: DistillationOrientedTrainer
    one_backward = False

    def __init__(self, learnable: Learnable, cfg: CN) -> None:
        for key, off, reason in (
            ("ACCUMULATE", 1, "keeps the two gradients of one batch and does not add those of micro-batches"),
            ("CLIP_GRAD_NORM", 0, "has two gradients, and their common norm is not defined"),
        ):
            if cfg.SOLVER[key] != off:
                raise UserError(f"SOLVER.{key} {cfg.SOLVER[key]}: DOT {reason}; set it to {off}")
        if cfg.SOLVER.AMP == "fp16":
            raise UserError("SOLVER.AMP fp16 scales one gradient, DOT has two; take bf16 or fp16-teacher")
        super().__init__(learnable, cfg)

    def backward(self, losses: dict[str, Tensor], weight: float = 1.0) -> Tensor:
        """One backward pass for the distillation losses and one for the task losses; returns the total loss ().

        Raises:
            UserError: there is no task loss, or no distillation loss.
        """
        task = [loss for name, loss in losses.items() if name in TASK_LOSSES]
        distillation = [loss for name, loss in losses.items() if name not in TASK_LOSSES]
        if not (task and distillation):
            raise UserError(
                f"DOT needs a task loss ({' or '.join(TASK_LOSSES[:2])}) and a distillation loss, this method has only "
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
        """Average the gradients over the ranks."""
        for p in self.parameters:
            if p.grad is not None:
                mean_over_ranks(p.grad)

    def _norm(self) -> Tensor:
        """The L2 norm () of the sum of both gradients."""
        return torch.stack(torch._foreach_norm(self.optimizer.gradients())).norm()

    def without_gradient(self) -> list[nn.Parameter]:
        return [p for p in super().without_gradient() if not self.optimizer.has_kd(p)]

    def drop(self) -> None:
        self.optimizer.drop_kd()
        super().drop()


def _total(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack([loss.mean() for loss in losses]).sum()
