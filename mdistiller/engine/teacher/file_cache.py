"""The teacher's outputs read from files, batch by batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from .row_files import RowFiles
from .rows import HitRate, RowSource


class FileCache:
    """Reads the teacher's outputs from files, and runs the teacher for images that are not stored yet.

    Call `look_up(index)` before each batch, then the cache with the batch's images.

    Args:
        folder: see `RowFiles`.
        max_bytes: largest size of both files together; if not all images fit, the first ones are stored.

    Raises:
        UserError: the folder cannot be written to, or the disk has no room.
    """

    waits = True

    def __init__(self, source: RowSource, folder: Path, max_bytes: int) -> None:
        self.source, self.loader = source, source.loader
        self.rows = min(source.rows, max_bytes // source.layout.bytes)
        if not self.rows:
            raise UserError(
                f"DISTILLER.TEACHER_CACHE_GIB is too small for one row of {source.layout.bytes} bytes; raise it"
            )
        self._files = RowFiles(folder, source.key, self.rows, source.layout)
        self._places = np.empty(0, dtype=np.int64)
        self.hit_rate, self.place = HitRate(), f"files in {folder}"

    def begin_epoch(self) -> None:
        """Nothing: rows are computed when they are asked for."""

    def look_up(self, index: Tensor) -> None:
        """Set the images of the next call by their `index` (B,) in the training set."""
        self._places = (index * self.loader.variants + self.loader.variant(index)).cpu().numpy()

    @torch.compiler.disable  # reads files, and would be compiled anew whenever a counter changes
    def __call__(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, C) and features of `image`, as the teacher computes them, rounded to the cache's dtype."""
        places, files = self._places, self._files
        assert len(places) == len(image), "call look_up(index) before each batch"
        kept = places < self.rows
        known = kept.copy()
        known[kept] = files.known[places[kept]] == 1
        self.hit_rate.count(len(places), int(known.sum()))

        rows = np.empty((len(places), files.values.shape[1]), dtype=files.values.dtype)
        rows[known] = files.values[places[known]]
        if not known.all():
            missing = torch.from_numpy(~known).to(image.device)
            rows[~known] = self.source.compute(image[missing]).cpu().numpy()
            new = kept & ~known
            files.write(places[new], rows[new])
        return self.source.layout.split(torch.from_numpy(rows).to(image.device))
