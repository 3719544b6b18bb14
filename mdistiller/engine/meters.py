"""Sums that stay on the device until somebody asks."""

from __future__ import annotations

import torch
from torch import Tensor


class Meters:
    """Weighted means of named tensors; adding costs no synchronisation, reading one."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, count: int, totals: dict[str, Tensor]) -> None:
        """Add () tensors that are totals over `count` images."""
        self.count += count
        for name, total in totals.items():
            self.sums[name] = self.sums[name] + total.double() if name in self.sums else total.double()

    def means(self) -> dict[str, float]:
        """The mean of every name over all images added so far."""
        if not self.sums:
            return {}
        values = (torch.stack(list(self.sums.values())) / self.count).tolist()
        return dict(zip(self.sums, values))
