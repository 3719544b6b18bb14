"""An exponential moving average (EMA) of a network's weights, which often generalises better than the last weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..distillers import Distiller
from ..models.copies import copy_without_hooks
from ..models.tensor_groups import by_kind


class EMA:
    """The EMA of a network's state; the attribute `network` holds it and can be used like the original network.

        mean <- d * mean + (1 - d) * state,   d = min(decay, (1 + n) / (10 + n)) at the n-th update

    so that the random start is soon forgotten. BatchNorm's statistics are averaged too; counters are copied.

    Args:
        network: on its device; the average carries none of its hooks.
        decay: in (0, 1).
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.network: nn.Module = copy_without_hooks(network).eval().requires_grad_(False)
        # On the device, as a CUDA graph reads it there.
        self._updates = torch.zeros((), dtype=torch.float64, device=next(network.parameters()).device)

    @property
    def updates(self) -> int:
        """The number of updates; reading it waits for the device."""
        return int(self._updates)

    @updates.setter
    def updates(self, number: int) -> None:
        self._updates.fill_(number)

    def begin(self, network: nn.Module) -> None:
        """Average from the present state of `network` on, as if it were made now."""
        self.load_state_dict({"updates": 0, "model": network.state_dict()})

    def tensors(self) -> list[Tensor]:
        """All that an update changes."""
        return [self._updates, *_state(self.network)]

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Update the average with the present state of `network`, without waiting for the device."""
        self._updates += 1
        share = 1 - ((1 + self._updates) / (10 + self._updates)).clamp(max=self.decay)  # of the present state
        for means, states in by_kind(_state(self.network), _state(network)):
            if means[0].is_floating_point() and means[0].device.type == "cpu":
                for mean, state in zip(means, states):  # on a CPU no slower than all at once
                    mean.lerp_(state, share.to(mean.dtype))
            elif means[0].is_floating_point():
                change = torch._foreach_sub(states, means)
                torch._foreach_mul_(change, share.to(means[0].device))
                torch._foreach_add_(means, change)
            else:
                torch._foreach_copy_(means, states)

    def logits(self, distiller: Distiller, image: Tensor) -> Tensor:
        """The first head's logits (B, C) of `distiller` with the averaged weights in its main network."""
        with _exchanged(distiller.main_network(), self.network):
            return next(iter(distiller.forward_heads(image).values()))

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: the number of updates, and the averaged state under "model"."""
        return {"updates": self.updates, "model": self.network.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state.

        Raises:
            KeyError, RuntimeError: the state belongs to another network.
        """
        self.network.load_state_dict(state["model"])
        self.updates = state["updates"]


def _state(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


@contextmanager
def _exchanged(one: nn.Module, other: nn.Module) -> Iterator[None]:
    """Within this context, two networks of the same structure have each other's parameters and buffers."""

    def exchange() -> None:
        for a, b in zip(one.modules(), other.modules()):
            a._parameters, b._parameters = b._parameters, a._parameters
            a._buffers, b._buffers = b._buffers, a._buffers

    exchange()
    try:
        yield
    finally:
        exchange()
