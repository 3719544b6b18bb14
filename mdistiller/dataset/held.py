"""Decoded images held in memory, from which views are made without reading their files again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ..console import note
from ..distributed.ranks import current_ranks
from ..system import usable_cpus
from .image_file import BrokenImageError, decoded_bytes, silent_pillow

GIB = 2**30
THREADS = 8  # Pillow decodes without Python's lock


def fits(paths: Sequence[str], gib: float, bytes_of: Callable[[str], int] = decoded_bytes) -> bool:
    """Whether the decoded images take at most `gib` GiB; reads headers, and no more of them than are needed.

    Args:
        bytes_of: path -> the size of its pixels in memory, in bytes.
    """
    left = gib * GIB
    with silent_pillow():
        for path in paths:
            try:
                left -= bytes_of(path)
            except BrokenImageError:  # decoding it says so
                continue
            if left < 0:
                return False
    return True


class Held:
    """The pixels of image files, decoded once; called with a path, it gives them, (H, W, 3) uint8 of any size.

    One tensor holds all of them, so that workers share it with the training process.

    Args:
        make: path -> (H, W, 3) uint8.
        skip_broken: keep what is wrong with a broken file, and raise it when the file is asked for.

    Raises:
        BrokenImageError: a file is broken, unless `skip_broken`.
    """

    def __init__(self, paths: Sequence[str], make: Callable[[str], Tensor], skip_broken: bool = False) -> None:
        self._reasons: dict[str, str] = {}
        self._places: dict[str, tuple[int, tuple[int, int, int]]] = {}
        pixels, start = [], 0
        for path, image in zip(paths, decoded(paths, make)):
            if isinstance(image, BrokenImageError):
                if not skip_broken:
                    raise BrokenImageError(f"{image}, or set DATASET.SKIP_BROKEN True") from None
                self._reasons[path] = str(image)
                continue
            height, width, channels = image.shape
            self._places[path] = start, (height, width, channels)
            start += image.numel()
            pixels.append(image.reshape(-1))
        self._pixels = _joined(pixels, start)
        if current_ranks().first:
            note(f"{len(self._places)} decoded images are held in memory, {start / GIB:.2f} GiB (DATASET.MEMORY_GIB)")

    def __call__(self, path: str) -> Tensor:
        if path in self._reasons:
            raise BrokenImageError(self._reasons[path])
        start, shape = self._places[path]
        return self._pixels[start : start + shape[0] * shape[1] * shape[2]].view(shape)


def _joined(pixels: list[Tensor], size: int) -> Tensor:
    """The concatenation of `pixels`, which is emptied meanwhile: both at once would take twice the memory."""
    whole, end = torch.empty(size, dtype=torch.uint8), size
    while pixels:
        last = pixels.pop()
        whole[end - len(last) : end] = last
        end -= len(last)
    return whole


def decoded(paths: Sequence[str], make: Callable[[str], Tensor]) -> list[Tensor | BrokenImageError]:
    """What `make` returns for each path, or what it raises of a broken file; in threads."""

    def one(path: str) -> Tensor | BrokenImageError:
        try:
            return make(path)
        except BrokenImageError as error:
            return error

    with silent_pillow(), ThreadPoolExecutor(min(THREADS, usable_cpus())) as pool:
        return list(pool.map(one, paths))
