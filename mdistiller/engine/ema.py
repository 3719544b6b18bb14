"""An exponential moving average (EMA) of a network's weights, which often generalises better than the last weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

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
        self._averaged = AveragedModel(copy_without_hooks(network), multi_avg_fn=self._average, use_buffers=True)
        self._averaged.n_averaged += 1  # at 0 its first update would copy the network; here the start counts too
        self.network: nn.Module = self._averaged.module.eval().requires_grad_(False)

    def update(self, network: nn.Module) -> None:
        """Update the average with the present state of `network`."""
        self.updates += 1
        self._averaged.update_parameters(network)

    @torch.no_grad()
    def _average(self, means: Any, states: Any, _: Any) -> None:
        """Update the averages `means` of tensors of one dtype on one device with their present `states`."""
        if means[0].is_floating_point():
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
            torch._foreach_lerp_(means, states, 1 - decay)
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
