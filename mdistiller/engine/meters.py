"""Sums that stay on the device until they are read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..distributed.ranks import Ranks


class Meters:
    """Weighted means of named tensors; adding does not synchronise with the device, reading does once."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, count: int, totals: dict[str, Tensor]) -> None:
        """Add scalar tensors () that are totals over `count` images."""
        self.count += count
        for name, total in totals.items():
            self.sums[name] = self.sums[name] + total.double() if name in self.sums else total.double()

    def over(self, ranks: Ranks) -> Meters:
        """The meters summed over all ranks. Every rank must call this, with the same names."""
        whole = Meters()
        if self.sums:
            *totals, count = ranks.sum(torch.stack([*self.sums.values(), self._count_tensor()])).unbind()
            whole.sums, whole.count = dict(zip(self.sums, totals)), int(count)
        return whole

    def means(self) -> dict[str, float]:
        """The mean of every name over all images added so far."""
        if not self.sums:
            return {}
        values = (torch.stack(list(self.sums.values())) / self.count).tolist()
        return dict(zip(self.sums, values))

    def _count_tensor(self) -> Tensor:
        return next(iter(self.sums.values())).new_tensor(self.count)

    def reset(self) -> None:
        """Remove all names and sums."""
        self.sums, self.count = {}, 0

    def clear(self) -> None:
        """Set all sums to zero; the names stay."""
        self.sums, self.count = {name: torch.zeros_like(total) for name, total in self.sums.items()}, 0

    def state_dict(self) -> dict[str, Any]:
        """The state for `load_state_dict`."""
        return {"count": self.count, "sums": dict(self.sums)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore a state."""
        self.count = state["count"]
        self.sums = {name: total.to(device) for name, total in state["sums"].items()}
