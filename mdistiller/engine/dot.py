"""Distillation-oriented training: the distillation gradient keeps more momentum than the task's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .split_gradients import TASK, SplitOptimizer, decayed, move

KD = "momentum_kd_buffer"


class DistillationOrientedTrainer(SplitOptimizer):
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

    kinds = (KD, TASK)
    title = "DOT"

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
        super().__init__(params, defaults, numbers=("lr", "momentum", "momentum_kd", "weight_decay"))
        for group in self.param_groups:
            if group["nesterov"] and (group["dampening"] or not (group["momentum"] and group["momentum_kd"])):
                raise ValueError("DOT: nesterov needs both momenta above 0 and no dampening")

    def step_kd(self) -> None:
        """Store the gradients as those of the distillation loss and set `p.grad` to None; no parameter changes yet."""
        self.kept.take(KD, self.parameters())

    def _update(self, params: list[Tensor], group: dict[str, Any], reach: frozenset[str]) -> None:
        task, kd = TASK in reach, KD in reach
        mean = (group["momentum"] + group["momentum_kd"]) / 2
        decay, directions = group["weight_decay"], []
        if task:
            grads = decayed(self._grads(TASK, params), params, decay)
            directions.append(self._direction(params, grads, TASK, group["momentum"] if kd else mean, group))
        if kd:
            grads = self._grads(KD, params)
            if not task:
                first = [KD not in self.state[p] for p in params]
                grads = [g if new else decayed([g], [p], decay)[0] for g, p, new in zip(grads, params, first)]
            directions.append(self._direction(params, grads, KD, group["momentum_kd"] if task else mean, group))
        for direction in directions:
            move(params, direction, group["lr"])

    def _direction(
        self, params: list[Tensor], grads: list[Tensor], key: str, momentum: float, group: dict[str, Any]
    ) -> list[Tensor]:
        """Update the momentum buffers `key` of `params` with `grads`; returns the directions of the step."""
        buffers = self._buffers(params, grads, key, momentum, share=1 - group["dampening"])
        return list(torch._foreach_add(grads, buffers, alpha=momentum)) if group["nesterov"] else buffers
