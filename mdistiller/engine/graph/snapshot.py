"""Tensors and random generators as they were, to undo a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...models.tensor_groups import by_kind
from ..runtime.seeds import random_state, set_random_state


class Snapshot:
    """Copies of `tensors`, and the state of the random generators, at this moment.

    Args:
        device: whose generator belongs to them.
    """

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        self.device = device
        self._tensors = list({id(t): t.detach() for t in tensors}.values())
        self._copies = [t.clone() for t in self._tensors]
        self._random = random_state(device)

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back in its place."""
        for targets, sources in by_kind(self._tensors, self._copies):
            torch._foreach_copy_(targets, sources)
        set_random_state(self._random, self.device)

    def drawn_on_host(self) -> list[str]:
        """The generators on the CPU from which numbers have been drawn since: "python", "numpy", "torch"."""
        now = random_state(self.device)
        return [name for name in ("python", "numpy") if now[name] != self._random[name]] + (
            [] if torch.equal(now["torch"], self._random["torch"]) else ["torch"]
        )
