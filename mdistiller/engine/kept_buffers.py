"""Puts back the buffers that a step's forward passes change, such as BatchNorm's statistics."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor


class _Place(NamedTuple):
    """Where a buffer is; the tensor there may be replaced."""

    module: nn.Module
    name: str

    @property
    def buffer(self) -> Tensor:
        tensor = self.module._buffers[self.name]
        assert tensor is not None
        return tensor


class KeptBuffers:
    """Keeps the buffers that forward passes change; which these are, the first sound step shows.

    Up to that step, `keep` copies all buffers, and `learn` compares: from then on, only those that had changed are
    copied. So a memory bank that changes only after a step is not copied at every step. Of a module whose buffers begin
    to change later, all are copied from the next step on; the version counters of its buffers tell.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._learnt = False
        self._changing: list[_Place] = []
        self._still: list[_Place] = []
        self._copies: list[Tensor] = []
        self._seen: list[tuple[Tensor, int]] = []  # of those that are still: the tensor and its version

    @torch.no_grad()
    def keep(self) -> None:
        """At the beginning of a step: copy what its forward passes may change."""
        if not self._learnt:
            self._changing = _places(self.module)
            self._copies = []
        buffers = [place.buffer for place in self._changing]
        if len(self._copies) == len(buffers):
            _copy(buffers, self._copies)
        else:
            self._copies = [buffer.clone() for buffer in buffers]
        self._seen = [(place.buffer, place.buffer._version) for place in self._still]

    def learn(self) -> None:
        """After the forward passes of a sound step: note what they have changed."""
        if not self._learnt:
            # By value: BatchNorm's kernels leave the version counters of its statistics as they are.
            changed = [p for p, copy in zip(self._changing, self._copies) if not torch.equal(p.buffer, copy)]
            self._watch(changed)
            self._learnt = True
            return
        seen = zip(self._still, self._seen)
        moved = [p for p, (tensor, version) in seen if p.buffer is not tensor or tensor._version != version]
        if moved:
            modules = {id(place.module) for place in moved}
            self._watch([*self._changing, *(place for place in self._still if id(place.module) in modules)])

    def _watch(self, changing: list[_Place]) -> None:
        """From now on, copy these buffers."""
        known = {(id(place.module), place.name) for place in changing}
        self._changing = changing
        self._still = [place for place in _places(self.module) if (id(place.module), place.name) not in known]
        self._copies, self._seen = [], []

    @torch.no_grad()
    def restore(self) -> None:
        """Put the copied buffers back."""
        _copy(self._copies, [place.buffer for place in self._changing])


def _places(module: nn.Module) -> list[_Place]:
    return [_Place(m, name) for m in module.modules() for name, buffer in m._buffers.items() if buffer is not None]


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    """Copy each source into its target, in one operation for each dtype."""
    by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for source, target in zip(sources, targets):
        own = by_dtype.setdefault(source.dtype, ([], []))
        own[0].append(source)
        own[1].append(target)
    for own_sources, own_targets in by_dtype.values():
        torch._foreach_copy_(own_targets, own_sources)
