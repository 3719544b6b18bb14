"""The update rule: how losses change the parameters. Only this module calls `backward()` and `step()`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor
from torch.optim import Optimizer
from yacs.config import CfgNode as CN

from ..distillers import Distiller
from ..models.parameters import Learnable, flat_parameters, parameter_groups
from ..models.tensor_groups import by_kind
from ..registry import Registry
from .lr_schedule import scaled_groups
from .optimizers import load_optimizer_state, optimizer_dict


class SumUpdate:
    """One step on the sum of the losses: `backward` for every micro-batch, then `step`.

    Args:
        learnable: the parameters to train; also groups of them, as torch.optim takes them, whose settings replace those
            of SOLVER. A group's own "lr" follows the schedule in proportion to SOLVER.LR.
        cfg: the whole configuration tree; its SOLVER section is used.

    Attributes:
        parameters: all of them, without their groups.

    Raises:
        UserError: no such SOLVER.TYPE.
        ValueError: see `flat_parameters`.
    """

    optimizers: ClassVar[Registry] = optimizer_dict
    # Whether DistributedDataParallel averages the gradients over the ranks during the backward pass.
    one_backward: ClassVar[bool] = True
    # What `SOLVER.TRAINER` switches on, in messages.
    title: ClassVar[str] = "base"

    @classmethod
    def prepare(cls, distiller: Distiller, cfg: CN) -> None:
        """Set what the rule needs of the method; called once, before anything is built of it."""

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
        total = total_of(losses.values())
        self._backward(total, weight)
        return total.detach()

    def _backward(self, loss: Tensor, weight: float, retain_graph: bool = False) -> None:
        """Accumulate the gradients of `weight` times a loss."""
        weighted = loss * weight if weight != 1 else loss
        (self.scaler.scale(weighted) if self.scaler else weighted).backward(retain_graph=retain_graph)

    def ready_to_compile(self) -> bool:
        """Whether the next step may be compiled."""
        return True

    def host_reads(self) -> str:
        """What the host reads in the optimizer's step, so that no CUDA graph can hold it; empty if nothing."""
        name = type(self.optimizer).__name__
        fused = all(group.get("fused") for group in self.optimizer.param_groups)
        if fused:
            return ""
        if self.scaler:
            return f"under SOLVER.AMP fp16 the host sees whether {name} may take the step"
        return f"{name} is not fused, and reads its learning rate on the host"

    def rates(self) -> list[Tensor]:
        """The learning rate () of each parameter group, on the device from now on, where a schedule fills it in."""
        device, taken = self.parameters[0].device, set()
        for group in self.optimizer.param_groups:
            lr = group["lr"]
            if not isinstance(lr, Tensor) or lr.device != device or lr in taken:  # of the host, or of several groups
                group["lr"] = torch.tensor(float(lr), device=device)
            taken.add(group["lr"])
            if "capturable" in group:
                group["capturable"] = True  # as torch's own check asks; the fused kernel is the same
        # Or torch would warn, at the first step, that no graph has been recorded yet.
        self.optimizer._warned_capturable_if_run_uncaptured = True  # type: ignore[attr-defined]
        return [group["lr"] for group in self.optimizer.param_groups]

    def settings(self) -> list[dict[str, Any]]:
        """What each parameter group has beside its parameters and its learning rate."""
        return [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in self.optimizer.param_groups]

    def tensors(self) -> list[Tensor]:
        """All that a step changes: the parameters, what the optimizer remembers of them, the loss scale of fp16."""
        remembered = [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        scale = [self.scaler._scale, self.scaler._growth_tracker] if self.scaler else []
        return [*self.parameters, *remembered, *(t for t in scale if t is not None)]

    def norm(self) -> Tensor:
        """The L2 norm () of the gradients, before clipping and without fp16's scale. Call it once a step at most."""
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        return norm_of([p.grad for p in self.parameters if p.grad is not None])

    def unexplained(self, norm: Tensor) -> Tensor:
        """`norm` (), from `norm()`; 0 where fp16's search for its scale may be why it is not finite.

        The scaler itself skips such steps, and halves the scale. Below a scale of 1 it is not the scale's fault.
        """
        if self.scaler is None:
            return norm
        return norm.where(self.scaler.scale(torch.ones_like(norm)) < 1, torch.zeros_like(norm))

    def step(self, norm: Tensor | None = None) -> None:
        """Clip the gradients if CLIP_GRAD_NORM is set, update the parameters and drop the gradients.

        Args:
            norm: what `norm()` has returned in this step; None if it was not called.
        """
        if self.max_norm:
            self._clip(self.norm() if norm is None else norm)
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self._drop()

    def without_gradient(self) -> list[nn.Parameter]:
        """The parameters that the backward passes since the last step gave no gradient; zero is one."""
        return [p for p in self.parameters if p.grad is None]

    def skip(self) -> None:
        """Drop the gradients instead of the step."""
        if self.scaler:
            self.scaler.update(self.scaler.get_scale())  # so that it forgets that `norm` has removed the scale
        self._drop()

    def _drop(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def _clip(self, norm: Tensor) -> None:
        """Scale the gradients to a norm of at most CLIP_GRAD_NORM, as torch's clip_grad_norm_ does."""
        factor = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
        for (grads,) in by_kind([p.grad for p in self.parameters if p.grad is not None]):
            torch._foreach_mul_(grads, factor.to(grads[0].device))

    def state_dict(self) -> dict[str, Any]:
        """The state for `load_state_dict`: the optimizer's, and the loss scale of fp16."""
        state = self.optimizer.state_dict()
        for group in state["param_groups"]:
            group["lr"] = float(group["lr"])
        return {"optimizer": state, "scaler": self.scaler.state_dict() if self.scaler else {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state; the settings stay those of this run, see `load_optimizer_state`.

        Raises:
            ValueError, KeyError: the state belongs to other parameters.
        """
        load_optimizer_state(self.optimizer, state["optimizer"])
        if self.scaler and state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])


def total_of(losses: Iterable[Tensor]) -> Tensor:
    """The sum () of the losses; the mean is taken of one that is not a scalar."""
    return torch.stack([loss.mean() if loss.ndim else loss for loss in losses]).sum()


def norm_of(grads: list[Tensor]) -> Tensor:
    """The L2 norm () of all gradients together; 0 if there are none."""
    if not grads:
        return torch.zeros(())
    norms = [norm for (group,) in by_kind(grads) for norm in torch._foreach_norm(group)]
    return torch.stack([norm.to(norms[0].device) for norm in norms]).norm()
