"""The teacher's outputs in the memory of the device: filled before each epoch, looked up within its steps.

The host waits for the device at an epoch's start alone: to learn which rows are missing, and to exchange rows with
files.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .row_files import RowFiles
from .row_table import RowTable
from .rows import HitRate, RowSource

# Pixels that the teacher computes at once, 1024 images of 32x32. On a CPU fewer: larger batches leave its caches.
_PIXELS, _PIXELS_ON_CPU = 2**20, 2**16
# Rows that are read from the files at once.
_READ = 2**18


class DeviceCache:
    """Looks the teacher's outputs up in a table on the device; a step waits for nothing, and reads no file.

    `begin_epoch` runs the teacher for the images of this process whose rows of the epoch are neither in the table nor
    in the files. That is a few large batches, all of the same number of images, so that the bits of a row do not depend
    on which others were known. Then call `look_up(index)` before each batch, and the cache with the batch's images.

    Args:
        source: its loader has `augmented(index)`, `own_images()` and `epoch` too.
        table: an empty one of all its rows, on the device.
        files: which rows are read from and written to; None: they are kept for this run alone.
        contiguous: whether the teacher gets images in NCHW memory, as in a step without channels_last.
    """

    waits = False

    def __init__(self, source: RowSource, table: RowTable, files: RowFiles | None, contiguous: bool) -> None:
        self.source, self.loader, self.table = source, source.loader, table
        self.hit_rate, self.place = HitRate(), f"the memory of {source.image.device}"
        self._files, self._contiguous = files, contiguous
        self._index: Tensor | None = None
        self._epoch: int | None = None
        if files is not None:
            self._load(files)

    def _load(self, files: RowFiles) -> None:
        """Copy the known rows from the files."""
        for start in range(0, self.source.rows, _READ):
            part = slice(start, start + _READ)
            known = files.known[part] == 1  # before the rows: another process may be writing
            if known.any():
                self.table.values[part] = torch.from_numpy(np.asarray(files.values[part])).to(self.table.values.device)
                self.table.known[part] = torch.from_numpy(known).to(self.table.known.device)

    @torch.no_grad()
    def begin_epoch(self) -> None:
        """Turn to the loader's epoch, and compute the rows of this process's images that are missing."""
        self.table.turn_to(self.loader.variant(self.table.every))
        own = self.loader.own_images()
        missing = self.table.missing(own)
        if self._files is not None and len(missing):
            missing = self._read(self._files, missing)
        self.hit_rate.count(len(own), len(own) - len(missing))
        if len(missing):
            self._fill(missing, self._at_once(len(own)))
            if self._files is not None and self._files.writable:
                self._write(self._files, missing)
        self._epoch = self.loader.epoch  # only now: a fill that failed is tried again

    def _at_once(self, own: int) -> int:
        """Images of one batch, for a process that has `own`."""
        pixels = _PIXELS_ON_CPU if self.source.image.device.type == "cpu" else _PIXELS
        return min(own, max(1, pixels // self.source.pixels))

    def _fill(self, missing: Tensor, count: int) -> None:
        """Compute the rows of the images `missing` (M,) in batches of `count`; what the last one lacks is repeated."""
        layout = torch.contiguous_format if self._contiguous else torch.preserve_format
        steps = torch.arange(count, device=missing.device)
        for start in range(0, len(missing), count):
            index = missing[(start + steps) % len(missing)]
            images = self.loader.augmented(index).to(self.source.image.dtype, memory_format=layout)
            new = index[: len(missing) - start]
            self.table.put(self.table.places[new], self.source.compute(images)[: len(new)])

    def _read(self, files: RowFiles, missing: Tensor) -> Tensor:
        """Take over rows of the images `missing` (M,) that others have written; returns the images that remain."""
        places = self.table.places[missing]
        on_host = places.cpu().numpy()
        known = files.known[on_host] == 1
        if not known.any():
            return missing
        there = torch.from_numpy(known).to(missing.device)
        self.table.put(places[there], torch.from_numpy(files.values[on_host[known]]).to(missing.device))
        return missing[~there]

    def _write(self, files: RowFiles, index: Tensor) -> None:
        places = self.table.places[index]
        files.write(places.cpu().numpy(), self.table.values[places].cpu().numpy())

    def look_up(self, index: Tensor) -> None:
        """Set the images of the next call by their `index` (B,) in the training set, on the device."""
        if self._epoch != self.loader.epoch:  # of a loop that calls no `begin_epoch`
            self.begin_epoch()
        self._index = index

    def __call__(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, C) and features of `image`, as the teacher computes them, rounded to the cache's dtype."""
        index = self._index
        assert index is not None and len(index) == len(image), "call look_up(index) before each batch"
        return self.source.layout.split(self.table.rows(index))
