"""The cache of the teacher's outputs, by image and variant: in files, in the memory of the device, or in both.

Images held in memory have a finite number of variants (crop and flip), so the outputs for a whole data set are a table
with one row per image and variant.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from yacs.config import CfgNode as CN

from ...console import note
from ...distributed.ranks import current_ranks
from ...errors import UserError
from ...system import free_memory
from .device_cache import DeviceCache
from .file_cache import FileCache
from .row_files import RowFiles
from .row_table import RowTable
from .rows import HitRate, RowSource

_WHERE = "DISTILLER.TEACHER_CACHE_DEVICE"
# Of the device's free memory, the share that "auto" takes: the networks' activations come after.
_SAFE = 0.5


class TeacherCache(Protocol):
    """Runs in place of the teacher: `begin_epoch`; in each step `look_up(index)`, then a call with the images."""

    hit_rate: HitRate
    # Where the rows lie, in words.
    place: str
    # Whether the host waits for the device, or for a file, within a step.
    waits: bool

    def begin_epoch(self) -> None:
        """Prepare for the loader's epoch, before its first step."""

    def look_up(self, index: Tensor) -> None:
        """Set the images of the next call by their `index` (B,) in the training set."""

    def __call__(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, C) and features of `image`, as the teacher computes them, rounded to the cache's dtype."""


def cache_wanted(cfg: CN) -> bool:
    """Whether the settings ask for a cache of the teacher's outputs."""
    return bool(cfg.DISTILLER.TEACHER_CACHE) or cfg.DISTILLER.TEACHER_CACHE_DEVICE == "device"


def no_cache(cfg: CN, why: str) -> UserError:
    """The error for a cache that cannot be used, with what a user sets to train without it."""
    folder, insists = bool(cfg.DISTILLER.TEACHER_CACHE), cfg.DISTILLER.TEACHER_CACHE_DEVICE == "device"
    name = "DISTILLER.TEACHER_CACHE" if folder else f"{_WHERE} device"
    remedies = ["leave it empty"] * folder + [f"set {_WHERE} auto"] * insists
    return UserError(f"{name} stores the teacher's outputs, but {why}; {' and '.join(remedies)}")


def teacher_cache(source: RowSource, cfg: CN) -> TeacherCache:
    """The cache that the settings ask for, see `cache_wanted`.

    Raises:
        UserError: TEACHER_CACHE_DEVICE is "device", and the rows do not fit; or the folder cannot be used.
    """
    where, folder = cfg.DISTILLER.TEACHER_CACHE_DEVICE, Path(cfg.DISTILLER.TEACHER_CACHE)
    limit, device = int(cfg.DISTILLER.TEACHER_CACHE_GIB * 2**30), source.image.device
    if where == "host" or (where == "auto" and device.type != "cuda"):
        return FileCache(source, folder, limit)
    table = _table(source, limit, _SAFE if where == "auto" else 1.0)
    if not isinstance(table, str):
        files = RowFiles(folder, source.key, source.rows, source.layout) if cfg.DISTILLER.TEACHER_CACHE else None
        return DeviceCache(source, table, files, contiguous=not cfg.SOLVER.CHANNELS_LAST)
    if where == "device":
        raise UserError(f"{_WHERE} device: {table}; or set {_WHERE} auto")
    if current_ranks().first:
        note(f"the teacher's outputs are read from {folder} and not from the device's memory: {table}")
    return FileCache(source, folder, limit)


def _table(source: RowSource, limit: int, share: float) -> RowTable | str:
    """An empty table of all rows; or why there is none, in words, and what would help.

    Args:
        limit: bytes that it may take.
        share: of the device's free memory that it may take.
    """
    loader, device = source.loader, source.image.device
    if not (hasattr(loader, "augmented") and hasattr(loader, "own_images")):
        return f"a {type(loader).__name__} has no augmented(index) and own_images(), which fill the table; add them"
    size = source.rows * source.layout.bytes
    words = f"the outputs for {source.rows} crops take {size / 2**30:.3g} GiB"
    if size > limit:
        return f"{words}, more than DISTILLER.TEACHER_CACHE_GIB {limit / 2**30:.3g}; raise it"
    spare = _free(device) * share
    if size > spare:
        return f"{words}, but of the memory of {device} only {spare / 2**30:.3g} GiB may be taken; free some"
    try:
        return RowTable(source.layout, len(loader.targets), loader.variants, device)
    except RuntimeError:  # of which torch's errors of memory are a kind
        return f"{words}, for which {device} has no room; free some"


def _free(device: torch.device) -> float:
    """Bytes of the device's memory that this process may still take; infinite where nobody tells."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return free_memory() if device.type == "cpu" else math.inf
