"""The gradients of several losses of one step, kept apart, and what the optimizers that take them share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

TASK = "momentum_buffer"


class KeptGradients:
    """Gradients that were taken off their parameters, by the kind of the loss that gave them."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[Tensor, Tensor]] = {}

    def take(self, kind: str, params: Sequence[Tensor]) -> None:
        """Keep the gradients of `params` as those of `kind`, added to what is kept, and set `p.grad` to None."""
        own = self._kept.setdefault(kind, {})
        for p in params:
            if p.grad is not None:
                own[p], p.grad = p.grad if p not in own else own[p] + p.grad, None

    def of(self, kind: str) -> dict[Tensor, Tensor]:
        """The gradients of a kind, by their parameters."""
        return self._kept.get(kind, {})

    def has(self, p: Tensor) -> bool:
        """Whether a gradient of the parameter `p` is kept."""
        return any(p in own for own in self._kept.values())

    def drop(self) -> None:
        self._kept = {}


class SplitOptimizer(Optimizer):
    """An optimizer of several gradients of each parameter, with a momentum buffer for each.

    After the backward pass of each loss but the task's, `kept.take(kind, params)` takes its gradients. Those of the
    task loss stay in `p.grad`. Then `step()` changes the parameters; zero is a gradient, None is not.

    Attributes:
        kinds: the keys of the buffers in an optimizer's state.
        title: its name in messages.
        kept: the gradients of the present step that are not in `p.grad`.
    """

    kinds: ClassVar[tuple[str, ...]]
    title: ClassVar[str]
    kept: KeptGradients

    def __init__(self, params: Any, defaults: dict[str, Any], numbers: Sequence[str]) -> None:
        """`numbers` are the settings of a group that must be >= 0."""
        super().__init__(params, defaults)
        self.kept = KeptGradients()
        for group in self.param_groups:
            for key in numbers:
                if not group[key] >= 0:
                    raise ValueError(f"{self.title}: {key} must be >= 0, it is {group[key]!r}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.kept = KeptGradients()

    def parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def gradient(self, kind: str, p: Tensor) -> Tensor | None:
        """The present gradient of a kind of the parameter `p`."""
        return p.grad if kind == TASK else self.kept.of(kind).get(p)

    def present(self) -> list[Tensor]:
        """Every present gradient, kind after kind."""
        found = (self.gradient(kind, p) for kind in self.kinds for p in self.parameters())
        return [grad for grad in found if grad is not None]

    def sums(self) -> list[Tensor]:
        """The sum of the present gradients, of every parameter that has one."""
        by_count: dict[int, list[list[Tensor]]] = {}
        for p in self.parameters():
            own = [grad for kind in self.kinds if (grad := self.gradient(kind, p)) is not None]
            by_count.setdefault(len(own), []).append(own)
        found: list[Tensor] = []
        for count, rows in by_count.items():
            total = [row[0] for row in rows] if count else []
            for place in range(1, count):
                total = list(torch._foreach_add(total, [row[place] for row in rows]))
            found += total
        return found

    def ready(self) -> bool:
        """Whether a step has shown which of the gradients each parameter receives."""
        return bool(self.state)

    def drop_zeros_for_none(self) -> None:
        """Drop the gradients of a kind that a parameter has received in no step so far.

        For a compiled graph, whose backward pass returns zeros to every parameter that any of its losses reaches. The
        first step must not be compiled, see `ready`.
        """
        for p in self.parameters() if self.state else ():
            received = self.state.get(p, {})
            for kind in self.kinds:
                if kind not in received and kind == TASK:
                    p.grad = None
                elif kind not in received:
                    self.kept.of(kind).pop(p, None)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update the parameters with the gradients that are kept and the present ones, of the task loss."""
        for group in self.param_groups:
            by_reach: dict[frozenset[str], list[Tensor]] = {}
            for p in group["params"]:
                now = {kind for kind in self.kinds if self.gradient(kind, p) is not None}
                if now:
                    reach = frozenset(kind for kind in self.kinds if kind in now or kind in self.state[p])
                    by_reach.setdefault(reach, []).append(p)
            for reach, params in by_reach.items():
                self._update(params, group, reach)
        self.kept.drop()

    def _update(self, params: list[Tensor], group: dict[str, Any], reach: frozenset[str]) -> None:
        """Update `params`, which have received the gradients of the kinds `reach` so far."""
        raise NotImplementedError

    def _grads(self, kind: str, params: list[Tensor]) -> list[Tensor]:
        """The gradients of a kind; one that is missing in a step counts as zero."""
        found = ((self.gradient(kind, p), p) for p in params)
        return [torch.zeros_like(p) if grad is None else grad for grad, p in found]

    def _buffers(
        self, params: list[Tensor], grads: list[Tensor], kind: str, momentum: float, share: float = 1.0
    ) -> list[Tensor]:
        """The momentum buffers of a kind, updated: momentum * v + share * g; a buffer starts as its first gradient."""
        running = [(self.state[p][kind], g) for p, g in zip(params, grads) if kind in self.state[p]]
        if running:
            buffers, news = map(list, zip(*running))
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, news, alpha=share)
        for p, g in zip(params, grads):
            if kind not in self.state[p]:
                self.state[p][kind] = g.clone()
        return [self.state[p][kind] for p in params]


def decayed(grads: list[Tensor], params: list[Tensor], decay: float) -> list[Tensor]:
    """g + decay * p."""
    return list(torch._foreach_add(grads, params, alpha=decay)) if decay else grads


def move(params: list[Tensor], direction: list[Tensor], lr: float | Tensor) -> None:
    """p - lr * direction, in place."""
    if isinstance(lr, Tensor):  # as a number, the host would have to read it
        torch._foreach_sub_(params, torch._foreach_mul(direction, lr))
    else:
        torch._foreach_add_(params, direction, alpha=-lr)
