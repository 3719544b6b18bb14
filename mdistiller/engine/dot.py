"""Distillation-oriented training: the distillation gradient keeps more momentum than the task's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

TASK, KD = "momentum_buffer", "momentum_kd_buffer"


class DistillationOrientedTrainer(Optimizer):
    """SGD with one momentum for the gradient of the task loss and another for that of the distillation loss.

        v_task <- momentum * v_task + (1 - dampening) * (g_task + weight_decay * p)
        v_kd   <- momentum_kd * v_kd + (1 - dampening) * g_kd
        p      <- p - lr * (v_task + v_kd)

    A buffer starts as its first gradient, without dampening. Call `step_kd()` after the backward pass of the
    distillation loss, then `step()` after that of the task loss. Only `step()` changes the parameters, so the two
    passes may share a graph.

    A parameter that has received only one of the two gradients so far (zero is a gradient, None is not) uses the mean
    of the two momenta, and its weight decay is added to the gradient it has. As in the original, a parameter that has
    received only the distillation gradient is not decayed in its first step. Once a parameter has received both, a
    gradient that is missing in a step counts as zero.

    Args:
        params: parameters, or parameter groups with their own values of the arguments below.
        lr: >= 0; a tensor () for a step that a CUDA graph records.
        momentum: of the task gradient, >= 0; DOT's MOMENTUM - DELTA.
        momentum_kd: of the distillation gradient, >= 0; DOT's MOMENTUM + DELTA.
        dampening: fraction of a gradient that is not added to its buffer.
        weight_decay: >= 0.
        nesterov: step along the gradient plus `momentum` times its new buffer, instead of along the buffer.

    Raises:
        ValueError: a value out of range.

    Reference: Zhao et al. 2023, arXiv 2307.08436, algorithm 1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.0,
        momentum_kd: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "momentum_kd": momentum_kd,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            for key in ("lr", "momentum", "momentum_kd", "weight_decay"):
                if not group[key] >= 0:
                    raise ValueError(f"DOT: {key} must be >= 0, it is {group[key]!r}")
            if group["nesterov"] and (group["dampening"] or not (group["momentum"] and group["momentum_kd"])):
                raise ValueError("DOT: nesterov needs both momenta above 0 and no dampening")
        self._kd_grads: dict[Tensor, Tensor] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._kd_grads = {}

    def step_kd(self) -> None:
        """Store the gradients as those of the distillation loss and set `p.grad` to None; no parameter changes yet."""
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            self._kd_grads[p], p.grad = p.grad, None

    def gradients(self) -> list[Tensor]:
        """The sum of both gradients, of every parameter that has one."""
        task, kd, alone = [], [], []
        for p in (p for group in self.param_groups for p in group["params"]):
            of_kd = self._kd_grads.get(p)
            if p.grad is not None and of_kd is not None:
                task.append(p.grad)
                kd.append(of_kd)
            elif p.grad is not None or of_kd is not None:
                alone.append(p.grad if of_kd is None else of_kd)
        return [*(torch._foreach_add(task, kd) if task else ()), *alone]

    def kd_gradients(self) -> list[Tensor]:
        """The gradients that `step_kd` stored, in the order of the parameters."""
        return [self._kd_grads[p] for group in self.param_groups for p in group["params"] if p in self._kd_grads]

    def has_kd(self, p: Tensor) -> bool:
        """Whether `step_kd` stored a gradient of the parameter `p`."""
        return p in self._kd_grads

    def ready(self) -> bool:
        """Whether a step has shown which of the two gradients each parameter receives."""
        return bool(self.state)

    def drop_zeros_for_none(self) -> None:
        """Drop the gradients of a kind that a parameter has received in no step so far.

        For a compiled graph, whose backward pass returns zeros to every parameter that any of its losses reaches. The
        first step must not be compiled, see `ready`.
        """
        for p in (p for group in self.param_groups for p in group["params"] if self.state):
            received = self.state.get(p, {})
            if TASK not in received:
                p.grad = None
            if KD not in received:
                self._kd_grads.pop(p, None)

    def drop_kd(self) -> None:
        """Drop the gradients that `step_kd` stored."""
        self._kd_grads = {}

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update the parameters with the gradients that `step_kd` stored and the present ones, of the task loss."""
        for group in self.param_groups:
            by_reach: dict[tuple[bool, bool], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None or p in self._kd_grads:
                    reached = (p.grad is not None or TASK in self.state[p], p in self._kd_grads or KD in self.state[p])
                    by_reach.setdefault(reached, []).append(p)
            for (task, kd), params in by_reach.items():
                self._update(params, group, task, kd)
        self._kd_grads = {}

    def _update(self, params: list[Tensor], group: dict[str, Any], task: bool, kd: bool) -> None:
        """Update `params`, which have received the `task` gradient, the distillation (`kd`) gradient, or both."""
        mean = (group["momentum"] + group["momentum_kd"]) / 2
        decay, directions = group["weight_decay"], []
        if task:
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            grads = _decayed(grads, params, decay)
            directions.append(self._direction(params, grads, TASK, group["momentum"] if kd else mean, group))
        if kd:
            grads = [self._kd_grads[p] if p in self._kd_grads else torch.zeros_like(p) for p in params]
            if not task:
                first = [KD not in self.state[p] for p in params]
                grads = [g if new else _decayed([g], [p], decay)[0] for g, p, new in zip(grads, params, first)]
            directions.append(self._direction(params, grads, KD, group["momentum_kd"] if task else mean, group))
        lr = group["lr"]
        for direction in directions:
            if isinstance(lr, Tensor):  # as a number, the host would have to read it
                torch._foreach_sub_(params, torch._foreach_mul(direction, lr))
            else:
                torch._foreach_add_(params, direction, alpha=-lr)

    def _direction(
        self, params: list[Tensor], grads: list[Tensor], key: str, momentum: float, group: dict[str, Any]
    ) -> list[Tensor]:
        """Update the momentum buffers `key` of `params` with `grads`; returns the directions of the step."""
        running = [(self.state[p][key], g) for p, g in zip(params, grads) if key in self.state[p]]
        if running:
            buffers, news = map(list, zip(*running))
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, news, alpha=1 - group["dampening"])
        for p, g in zip(params, grads):
            if key not in self.state[p]:
                self.state[p][key] = g.clone()
        buffers = [self.state[p][key] for p in params]
        return list(torch._foreach_add(grads, buffers, alpha=momentum)) if group["nesterov"] else buffers


def _decayed(grads: list[Tensor], params: list[Tensor], decay: float) -> list[Tensor]:
    return list(torch._foreach_add(grads, params, alpha=decay)) if decay else grads
