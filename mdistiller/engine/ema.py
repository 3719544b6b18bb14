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
        self.updates = 0
        self.network = copy_without_hooks(network).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Update the average with the present state of `network`."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        pairs = list(zip(self.network.state_dict().values(), network.state_dict().values()))
        means, states = map(list, zip(*[pair for pair in pairs if pair[0].is_floating_point()]))
        torch._foreach_lerp_(means, states, 1 - decay)
        for mean, state in pairs:
            if not mean.is_floating_point():
                mean.copy_(state)

    def logits(self, distiller: Distiller, image: Tensor) -> Tensor:
        """The first head's logits (B, C) of `distiller` with the averaged weights in its main network."""
        with _exchanged(distiller.main_network(), self.network):
            return next(iter(distiller.forward_heads(image).values()))

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: the number of updates, and the averaged state under "model"."""
        return {"updates": self.updates, "model": self.network.state_dict()}


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
