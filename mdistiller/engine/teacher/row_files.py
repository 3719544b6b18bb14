"""Rows of the teacher's cache on disk: computed once, reused by this run and by later ones.

Two memory-mapped files in the cache's folder have one row for each image and variant:

    <key>.values   the rows
    <key>.known    one byte per row: 1 if the row has been written

The key tells what rows depend on, so different ones never share a file. Several runs may share a file: each writes the
rows it computes, and all would write the same values, up to the rounding of batches of different sizes.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ...console import note
from ...errors import UserError
from ...system import allocate
from .rows import NUMPY, RowLayout


class RowFiles:
    """The two files of a key.

    Args:
        folder: created if missing; one that cannot be written to is read, if it holds the files in full.
        rows: how many, from the first one on.

    Attributes:
        values: (rows, width) of the layout's type, mapped.
        known: (rows,) uint8, mapped; 1 where a row is there.
        writable: whether the files can be changed; else what is written stays in this process.

    Raises:
        UserError: the folder cannot be written to, or the disk has no room.
    """

    def __init__(self, folder: Path, key: str, rows: int, layout: RowLayout) -> None:
        values = _mapped(folder / f"{key}.values", rows * layout.width, NUMPY[layout.dtype])
        self.writable = values.mode != "c"
        if not self.writable:
            note(f"the teacher's cache in {folder} is read-only; what this run adds to it is kept in memory alone")
        self.values = values.reshape(rows, layout.width)
        self.known = _mapped(folder / f"{key}.known", rows, np.uint8)

    def write(self, places: np.ndarray, rows: np.ndarray) -> None:
        """Write the rows (R, width) at `places` (R,)."""
        self.values[places] = rows
        self.known[places] = 1  # after the row itself, so that a killed run marks no half-written row


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
