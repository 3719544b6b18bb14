"""Sums that stay on the device until they are read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..distributed.ranks import Ranks

Names = tuple[str, ...]


class Meters:
    """Weighted means of named numbers; adding does not synchronise with the device, reading does once."""

    def __init__(self) -> None:
        # One vector for each set of names, so that adding is one operation. A method may return other losses later.
        self._sums: dict[Names, Tensor] = {}
        self.count = 0

    def add(self, count: int, names: Names, sums: Tensor) -> None:
        """Add `sums` (len(names),) float64, which are totals over `count` images."""
        self.count += count
        # Not in place: several meters may be given the same tensor.
        self._sums[names] = self._sums[names] + sums if names in self._sums else sums

    def hold(self, names: Names, buffer: Tensor) -> None:
        """Let `buffer` (len(names),) float64 hold the sums of `names`: what is added to it counts in the meters."""
        own = self._sums.get(names)
        if own is buffer:
            return
        if own is None:
            buffer.zero_()
        else:
            buffer.copy_(own)
        self._sums[names] = buffer

    def release(self, buffer: Tensor) -> None:
        """Keep the sums that `buffer` holds now; what is added to it from now on counts elsewhere."""
        self._sums = {names: sums.clone() if sums is buffer else sums for names, sums in self._sums.items()}

    def set_mean(self, name: str, value: Tensor) -> None:
        """Let `value` () be the mean of `name` over all images added so far."""
        self._sums[name,] = value.double().reshape(1) * self.count

    def sums(self) -> dict[str, Tensor]:
        """Every name's sum ()."""
        every: dict[str, Tensor] = {}
        for names, sums in self._sums.items():
            for name, total in zip(names, sums.unbind()):
                every[name] = every[name] + total if name in every else total
        return every

    def over(self, ranks: Ranks) -> Meters:
        """The meters summed over all ranks. Every rank must call this, with the same names."""
        whole, every = Meters(), self.sums()
        if every:
            totals = torch.stack(list(every.values()))
            totals = ranks.sum(torch.cat([totals, totals.new_full((1,), self.count)]))
            whole.count = int(totals[-1])
            whole._sums = {tuple(every): totals[:-1]}
        return whole

    def means(self) -> dict[str, float]:
        """The mean of every name over all images added so far."""
        every = self.sums()
        if not every:
            return {}
        return dict(zip(every, (torch.stack(list(every.values())) / self.count).tolist()))

    def reset(self) -> None:
        """Remove all names and sums."""
        self._sums, self.count = {}, 0

    def clear(self) -> None:
        """Set all sums to zero; the names stay."""
        self._sums, self.count = {names: torch.zeros_like(sums) for names, sums in self._sums.items()}, 0

    def state_dict(self) -> dict[str, Any]:
        """The state for `load_state_dict`: the count, and each name's sum ()."""
        return {"count": self.count, "sums": {name: total.clone() for name, total in self.sums().items()}}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore a state."""
        self.count, sums = state["count"], state["sums"]
        self._sums = {tuple(sums): torch.stack(list(sums.values())).to(device)} if sums else {}
