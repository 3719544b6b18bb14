"""The teacher's outputs on disk, by image and crop: computed once, reused by this run and by later ones.

Images held in memory have a finite number of variants (crop and flip), so the outputs for a whole data set are a table
with one row per image and variant, in two memory-mapped files in the cache's folder:

    <key>.values   the rows: logits and pooled features, or the one of them that the method reads
    <key>.known    one byte per row: 1 if the row has been written

The key is a digest of the teacher's architecture and weights, of the arithmetic it runs in, of the data and
augmentation, and of the layout of a row, so outputs of different ones never share a file. Several runs may share a
file: each writes the rows it computes, and all runs would write the same values.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from ...console import note
from ...errors import UserError
from ...system import allocate
from ..files.checksum import weights_digest

# What can be stored; `engine.modes` refuses methods that read more.
OUTPUTS = ("logits", "pooled_feat")
_DTYPES = {"fp16": np.float16, "fp32": np.float32}


class TeacherCache:
    """Reads the teacher's outputs from disk, and runs the teacher for images that are not stored yet.

    Call `look_up(index)` before each batch, then the cache with the batch's images.

    Args:
        folder: created if missing; one that cannot be written to is read, if it holds the files in full.
        teacher: its weights determine the names of the files.
        run: the teacher's function: images (B, 3, H, W) -> (logits (B, C), {"pooled_feat": (B, D), ...}).
        arithmetic: what the rounding of `run` depends on, such as "cpu torch.bfloat16 folded".
        image: (1, 3, H, W), an input of the right size.
        loader: of the training images, with `variants`, `variant(index)` and `fingerprint`.
        outputs: which of "logits" and "pooled_feat" a row holds.
        dtype: "fp16" or "fp32", the precision of the rows.
        max_bytes: largest size of both files together; if not all images fit, the first ones are stored.

    Attributes:
        asked, found: number of rows requested and found since the last `hit_rate`.

    Raises:
        UserError: the folder cannot be written to, or the disk has no room.
    """

    def __init__(
        self, folder: Path, teacher: nn.Module, run: Callable[[Tensor], Any], arithmetic: str, image: Tensor,
        loader: Any, outputs: Sequence[str], dtype: str, max_bytes: int,
    ) -> None:  # fmt: skip
        self.run, self.loader = run, loader
        self.outputs = [name for name in OUTPUTS if name in outputs]
        self.widths = [output.shape[1] for output in self._select(run(image))]
        width = sum(self.widths)
        bytes_a_row = width * np.dtype(_DTYPES[dtype]).itemsize + 1
        self.rows = min(len(loader.targets) * loader.variants, max_bytes // bytes_a_row)
        if not self.rows:
            raise UserError(f"DISTILLER.TEACHER_CACHE_GIB is too small for one row of {bytes_a_row} bytes; raise it")
        rows = f"{self.outputs} {self.widths} {dtype}"
        key = hashlib.sha256(f"{_digest(teacher)} {arithmetic} {loader.fingerprint} {rows}".encode()).hexdigest()[:32]
        values = _mapped(folder / f"{key}.values", self.rows * width, _DTYPES[dtype])
        if values.mode == "c":
            note(f"the teacher's cache in {folder} is read-only; what this run adds to it is kept in memory alone")
        self._values = values.reshape(self.rows, width)
        self._known = _mapped(folder / f"{key}.known", self.rows, np.uint8)
        self._places = np.empty(0, dtype=np.int64)
        self.asked = self.found = 0

    def _select(self, output: Any) -> list[Tensor]:
        logits, features = output
        return [logits if name == "logits" else features[name].flatten(1) for name in self.outputs]

    def look_up(self, index: Tensor) -> None:
        """Set the images of the next call by their `index` (B,) in the training set."""
        self._places = (index * self.loader.variants + self.loader.variant(index)).cpu().numpy()

    @torch.compiler.disable  # reads files, and would be compiled anew whenever a counter changes
    def __call__(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, C) and features of `image`, as the teacher computes them, rounded to the cache's dtype."""
        places = self._places
        assert len(places) == len(image), "call look_up(index) before each batch"
        kept = places < self.rows
        known = kept.copy()
        known[kept] = self._known[places[kept]] == 1
        self.asked += len(places)
        self.found += int(known.sum())

        rows = np.empty((len(places), self._values.shape[1]), dtype=self._values.dtype)
        rows[known] = self._values[places[known]]
        if not known.all():
            missing = torch.from_numpy(~known).to(image.device)
            output = torch.cat(self._select(self.run(image[missing])), dim=1)
            rows[~known] = output.float().cpu().numpy()
            new = kept & ~known
            self._values[places[new]] = rows[new]
            self._known[places[new]] = 1  # after the row itself, so that a killed run marks no half-written row
        split = torch.from_numpy(rows).to(image.device).float().split(self.widths, dim=1)
        named = dict(zip(self.outputs, split))
        return named.pop("logits", image.new_empty(0)), named

    def hit_rate(self) -> float:
        """The percentage of the rows requested since the last call that were found in the cache."""
        rate = 100 * self.found / max(self.asked, 1)
        self.asked = self.found = 0
        return rate


def _digest(teacher: nn.Module) -> str:
    """A digest of a network's class and layers, its weights and their names."""
    kind = type(teacher)
    return weights_digest(teacher, f"{kind.__module__}.{kind.__qualname__} {teacher!r}")


def _mapped(path: Path, count: int, dtype: Any) -> np.memmap:
    """The file `path` mapped as `count` numbers, zeros if it is new; several processes may map it at once.

    One that is there in full and cannot be written to is mapped in mode "c": changes stay in this process.
    """
    size = count * np.dtype(dtype).itemsize
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            # All of its disk space now: writing to a mapped file on a full disk would kill the process.
            allocate(file, size)
        return np.memmap(path, dtype=dtype, mode="r+", shape=(count,))
    except OSError as error:
        with suppress(OSError, ValueError):  # ValueError: it is too short
            if error.errno in (errno.EROFS, errno.EACCES):
                return np.memmap(path, dtype=dtype, mode="c", shape=(count,))
        raise UserError(
            f"the teacher's cache {path} of {size / 2**30:.2f} GiB cannot be created ({error.strerror}); lower "
            "DISTILLER.TEACHER_CACHE_GIB, or name another folder in DISTILLER.TEACHER_CACHE"
        ) from None
