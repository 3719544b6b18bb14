"""Rows of the teacher's cache in the memory of a device."""

from __future__ import annotations

import torch
from torch import Tensor

from .rows import TORCH, RowLayout


class RowTable:
    """One row for each image and variant, looked up by image without waiting for the device.

    Its tensors are allocated once and then changed in place, so that a CUDA graph that reads them stays right.

    Args:
        images: N.
        variants: V, of each image.

    Attributes:
        values: (N * V, width) of the layout's type.
        known: (N * V,) bool: the rows that are there.
        places: (N,) int64: the row of each image in the present epoch; see `turn_to`.

    Raises:
        RuntimeError: the device has no room.
    """

    def __init__(self, layout: RowLayout, images: int, variants: int, device: torch.device | str) -> None:
        self.values = torch.zeros(images * variants, layout.width, dtype=TORCH[layout.dtype], device=device)
        self.known = torch.zeros(images * variants, dtype=torch.bool, device=device)
        self.every = torch.arange(images, device=device)
        self.places = self.every * variants
        self._firsts = self.places.clone()

    def turn_to(self, variant: Tensor) -> None:
        """Show each image in its `variant` (N,) int64 from now on."""
        torch.add(self._firsts, variant, out=self.places)

    def missing(self, index: Tensor) -> Tensor:
        """Those of the images `index` (B,) whose row is not there. Waits for the device."""
        return index[~self.known[self.places[index]]]

    def put(self, places: Tensor, rows: Tensor) -> None:
        """Store the rows (R, width) at `places` (R,) int64."""
        self.values.index_copy_(0, places, rows.to(self.values.dtype))
        self.known.index_fill_(0, places, True)

    def rows(self, index: Tensor) -> Tensor:
        """(B, width): the rows of the images `index` (B,)."""
        return self.values.index_select(0, self.places.index_select(0, index))
