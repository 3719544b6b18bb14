"""Puts back the buffers that a step's forward passes change, such as BatchNorm's statistics."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from ..distillers import Distiller
from ..errors import UserError
from ..models.tensor_groups import by_kind


class _Place(NamedTuple):
    """Where a buffer is; the tensor there may be replaced."""

    module: nn.Module
    name: str

    @property
    def buffer(self) -> Tensor:
        tensor = self.module._buffers[self.name]
        assert tensor is not None
        return tensor


# Elements of the largest buffer that is always copied; BatchNorm's have a few thousand at most.
_SMALL = 2**16


class KeptBuffers:
    """Keeps the buffers that forward passes change, so that a step can be undone.

    All small ones are copied at each step. Those of frozen networks and large ones, such as memory banks, are copied up
    to the first sound step, and from then on if that step's forward passes have changed them.

    Args:
        distiller: also its frozen networks and its other modules.
    """

    def __init__(self, distiller: Distiller) -> None:
        self.distiller = distiller
        self._learnt = False
        self._copied: list[_Place] = []
        self._copies: list[Tensor] = []
        self._left: list[_Place] = []
        self._seen: list[tuple[Tensor, int]] = []  # of those that are left out: the tensor and its version

    @torch.no_grad()
    def keep(self) -> None:
        """At the beginning of a step: copy what its forward passes may change."""
        if not self._learnt:
            self._copied = _places(self.distiller)
            self._copies = []
        buffers = [place.buffer for place in self._copied]
        if len(self._copies) == len(buffers):
            _copy(buffers, self._copies)
        else:
            self._copies = [buffer.clone() for buffer in buffers]
        self._seen = [(place.buffer, place.buffer._version) for place in self._left]

    def learn(self) -> None:
        """After the forward passes of the first sound step: note what may be left out from now on."""
        if self._learnt:
            return
        self._learnt = True
        frozen = {m for name in self.distiller.evaluated for m in self.distiller.get_submodule(name).modules()}
        places, copies = self._copied, self._copies
        # By value: BatchNorm's kernels leave the version counters of its statistics as they are.
        self._left = [
            place
            for place, copy in zip(places, copies)
            if (place.module in frozen or copy.numel() > _SMALL) and torch.equal(place.buffer, copy)
        ]
        self._copied = [place for place in places if place not in self._left]
        self._copies = []

    @torch.no_grad()
    def restore(self) -> None:
        """Put the copied buffers back.

        Raises:
            UserError: the step has changed one that was left out.
        """
        _copy(self._copies, [place.buffer for place in self._copied])
        for place, (tensor, version) in zip(self._left, self._seen):
            if place.buffer is not tensor or tensor._version != version:
                raise UserError(
                    f"SOLVER.NAN_POLICY skip cannot undo what {type(self.distiller).__name__} has done to the buffer "
                    f"{place.name!r} of a {type(place.module).__name__}, which its first step did not change; do it in "
                    "after_step(), or set SOLVER.NAN_POLICY stop"
                )


def _places(module: nn.Module) -> list[_Place]:
    return [_Place(m, name) for m in module.modules() for name, buffer in m._buffers.items() if buffer is not None]


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    """Copy each source into its target, in one operation for each kind."""
    for own_sources, own_targets in by_kind(sources, targets):
        torch._foreach_copy_(own_targets, own_sources)
