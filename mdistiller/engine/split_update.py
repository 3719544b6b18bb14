"""Update rules that take the gradients of a step's losses apart: DOT, DeepKD, aligned gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn as nn
from torch import Tensor
from yacs.config import CfgNode as CN

from ..distillers import Distiller
from ..distributed.gather import mean_over_ranks, world_size
from ..errors import UserError
from ..models.parameters import Learnable
from ..models.tensor_groups import by_kind
from .deepkd import OTHERS, TARGET, DeepKDOptimizer
from .dot import KD, DistillationOrientedTrainer
from .optimizers import deepkd_optimizer_dict, dot_optimizer_dict
from .split_gradients import TASK, KeptGradients, SplitOptimizer
from .update import SumUpdate, norm_of, total_of

# Names of the task losses; all other losses of a distiller are distillation losses.
TASK_LOSSES = ("ce", "loss_ce", "loss_CE", "loss_multi_ce")


class SplitUpdate(SumUpdate):
    """One backward pass for each kind of loss, whose gradients are kept apart. `engine.modes` says what it refuses."""

    one_backward = False

    @property
    def kept(self) -> KeptGradients:
        """The gradients that are not in `p.grad`."""
        raise NotImplementedError

    def split(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss () of each kind, in the order of the backward passes: the task's last, under `TASK`.

        Raises:
            UserError: there is none of a kind.
        """
        raise NotImplementedError

    def backward(self, losses: dict[str, Tensor], weight: float = 1.0) -> Tensor:
        """Accumulate the gradients of `weight` times each kind of loss; returns the unweighted sum of all ().

        Raises:
            UserError: see `split`.
        """
        parts = self.split(losses)
        for kind, loss in parts.items():
            self._backward(loss, weight, retain_graph=kind != TASK)
            if kind != TASK:
                self.kept.take(kind, self.parameters)
        return total_of(parts.values()).detach()

    def without_gradient(self) -> list[nn.Parameter]:
        return [p for p in super().without_gradient() if not self.kept.has(p)]

    def _drop(self) -> None:
        self.kept.drop()
        super()._drop()


class MomentaUpdate(SplitUpdate):
    """A rule whose optimizer has a momentum for each kind of loss."""

    optimizer: SplitOptimizer
    optimizer_class: ClassVar[type[SplitOptimizer]]

    def __init__(self, learnable: Learnable, cfg: CN) -> None:
        super().__init__(learnable, cfg)
        self.compiled = cfg.SOLVER.COMPILE

    @property
    def kept(self) -> KeptGradients:
        return self.optimizer.kept

    def ready_to_compile(self) -> bool:
        return self.optimizer.ready()

    def host_reads(self) -> str:
        return ""

    def backward(self, losses: dict[str, Tensor], weight: float = 1.0) -> Tensor:
        total = super().backward(losses, weight)
        if self.compiled:
            self.optimizer.drop_zeros_for_none()
        average(self.optimizer.present())
        return total

    def norm(self) -> Tensor:
        """The L2 norm () of the sum of the gradients."""
        return norm_of(self.optimizer.sums())


class DotUpdate(MomentaUpdate):
    """One step of DOT: "ce" and "loss_ce" are task losses, all others distillation losses. arXiv 2307.08436."""

    optimizers = dot_optimizer_dict
    optimizer_class = DistillationOrientedTrainer
    title = "DOT"

    def split(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        return task_and_distillation(losses, self.title)


class DeepKDUpdate(MomentaUpdate):
    """One step of DeepKD on the losses of `Distiller.forward_decoupled`. arXiv 2505.15133."""

    optimizers = deepkd_optimizer_dict
    optimizer_class = DeepKDOptimizer
    title = "DeepKD"
    losses_of: ClassVar[dict[str, str]] = {OTHERS: "loss_nckd", TARGET: "loss_tckd", TASK: "loss_task"}

    @classmethod
    def prepare(cls, distiller: Distiller, cfg: CN) -> None:
        distiller.decouple(cfg.SOLVER.DEEPKD.TOPK)

    def split(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        if losses.keys() != set(self.losses_of.values()):
            raise UserError(
                f"DeepKD needs the losses {', '.join(self.losses_of.values())}, this method has {', '.join(losses)}; "
                "use SOLVER.TRAINER base"
            )
        return {kind: total_of([losses[name]]) for kind, name in self.losses_of.items()}


class AlignedUpdate(SplitUpdate):
    """A step in which the distillation gradient never points against the task gradient.

        c = min(0, <g_kd, g_task>) / |g_task|^2,   g = g_task + g_kd - c * g_task

    The inner product and the norm are over all trained parameters together, so that what one of the gradients does not
    reach counts as zero in it. Where the gradients disagree, c < 0, the component of g_kd along g_task is taken out: it
    is then perpendicular to g_task. The optimizer takes g as any gradient, so that every SOLVER.TYPE, clipping, fp16
    and micro-batches work: these add up the gradients of the whole batch first, and ranks average them.

    Reference: Yang et al. 2024, arXiv 2411.08937, section 3.3.
    """

    title = "aligned gradients"

    def __init__(self, learnable: Learnable, cfg: CN) -> None:
        super().__init__(learnable, cfg)
        self._kept = KeptGradients()

    @property
    def kept(self) -> KeptGradients:
        return self._kept

    def split(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        return task_and_distillation(losses, "gradient alignment")

    def backward(self, losses: dict[str, Tensor], weight: float = 1.0) -> Tensor:
        total = super().backward(losses, weight)
        self.kept.take(TASK, self.parameters)  # or the next micro-batch's first pass would add to it
        return total

    def norm(self) -> Tensor:
        """The L2 norm () of the step's gradient, before clipping and without fp16's scale. Once a step at most."""
        self._join()
        return super().norm()

    def step(self, norm: Tensor | None = None) -> None:
        self._join()
        super().step(norm)

    def _join(self) -> None:
        """Make the step's gradient of those that are kept, if that is not done."""
        task, kd = self.kept.of(TASK), self.kept.of(KD)
        if not (task or kd):
            return
        average([*task.values(), *kd.values()])
        both = [p for p in self.parameters if p in task and p in kd]
        scale = 1 - disagreement([kd[p] for p in both], [task[p] for p in both], list(task.values()))
        for (grads,) in by_kind(list(task.values())) if task else ():
            torch._foreach_mul_(grads, scale.to(grads[0]))
        for own, others in by_kind([task[p] for p in both], [kd[p] for p in both]) if both else ():
            torch._foreach_add_(own, others)
        for p in self.parameters:
            p.grad = task.get(p, kd.get(p))
        self.kept.drop()


def disagreement(kd: Sequence[Tensor], task: Sequence[Tensor], whole: Sequence[Tensor]) -> Tensor:
    """min(0, <g_kd, g_task>) / |g_task|^2, () float32 or float64; 0 where g_task is 0.

    Args:
        kd, task: both gradients of the parameters that have both.
        whole: the task gradient of all parameters.
    """
    inner, square = _dot(kd, task), _dot(whole, whole)
    # Where the norm's square is 0 by underflow, so is the inner product but for rounding.
    against = (inner < 0) & (square > 0)
    return (inner / square.where(against, torch.ones_like(square))).where(against, torch.zeros_like(inner))


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """The inner product () of two gradients, of all parameters together; 0 if there are none."""
    products = [
        torch.dot(*(torch.cat([grad.flatten() for grad in grads]) for grads in pair)) for pair in by_kind(one, other)
    ] if one else [torch.zeros(())]  # fmt: skip
    return torch.stack([product.to(products[0]) for product in products]).sum()


def average(grads: list[Tensor]) -> None:
    """Average gradients over the ranks, in place: one exchange for each dtype."""
    if world_size() == 1:
        return
    for (own,) in by_kind(grads) if grads else ():
        flat = mean_over_ranks(torch.cat([grad.flatten() for grad in own]))
        pieces = flat.split([grad.numel() for grad in own])
        torch._foreach_copy_(own, [piece.view(grad.shape) for piece, grad in zip(pieces, own)])


def task_and_distillation(losses: dict[str, Tensor], title: str) -> dict[str, Tensor]:
    """The distillation loss () under `KD` and the task loss () under `TASK`.

    Raises:
        UserError: one of the two is missing.
    """
    task = [loss for name, loss in losses.items() if name in TASK_LOSSES]
    distillation = [loss for name, loss in losses.items() if name not in TASK_LOSSES]
    if not (task and distillation):
        raise UserError(
            f"{title} needs a task loss ({' or '.join(TASK_LOSSES[:2])}) and a distillation loss, this method has only "
            f"{', '.join(losses)}; use SOLVER.TRAINER base"
        )
    return {KD: total_of(distillation), TASK: total_of(task)}
