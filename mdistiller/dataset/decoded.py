"""Many small image files as one array: decoded once, then cached on disk next to them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..console import note
from ..user_files import discard
from .image_file import BrokenImageError, read_pixels, silent_pillow, warn_of_broken

# Part of every cache's key. Change it when the same file gives other pixels than before.
READING = b"grey of 16 bits scaled\0"


def read_decoded(paths: Sequence[str], size: int, cache: Path, skip_broken: bool) -> tuple[Tensor, Tensor]:
    """The pixels (K, size, size, 3) uint8 of the intact images, and their indices (K,) int64 in `paths`, ascending.

    They are loaded from the file `cache` if it is undamaged and was made from the same files (names, sizes and
    modification times); else they are decoded, and written to `cache` if possible.

    Raises:
        BrokenImageError: an image is broken or of another size, unless `skip_broken`, which skips it with a warning.
    """
    key = _key(paths, cache.parent)
    images, reasons = _load(cache, key) or _decode_and_store(paths, size, cache, key, skip_broken)
    broken = {path: reason for path, reason in zip(paths, reasons.tolist()) if reason}
    if broken and not skip_broken:
        raise _first(broken)
    if broken:
        warn_of_broken(broken, len(paths), "were left out (DATASET.SKIP_BROKEN)")
    intact = torch.from_numpy(reasons == "").nonzero()[:, 0]
    pixels = torch.from_numpy(images)
    return (pixels[intact] if broken else pixels), intact


def _first(broken: dict[str, str]) -> BrokenImageError:
    return BrokenImageError(next(iter(broken.values())) + ", or set DATASET.SKIP_BROKEN True")


def _key(paths: Sequence[str], folder: Path) -> str:
    """A digest of the way of reading, and of the files' names below `folder`, sizes and modification times."""
    digest = hashlib.sha256(READING)
    for path in paths:
        try:
            found = os.stat(path)
            state = f"{found.st_size} {found.st_mtime_ns}"
        except OSError:
            state = "missing"
        digest.update(os.fsencode(f"{os.path.relpath(path, folder)}\0{state}\0"))
    return digest.hexdigest()


def _load(cache: Path, key: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Pixels, and what is wrong with each image ("" for nothing); None if `cache` has none for `key`."""
    try:
        with open(cache, "rb") as file, np.load(file, allow_pickle=False) as arrays:  # a zip: it verifies checksums
            return (arrays["images"], arrays["reasons"]) if arrays["key"].item() == key else None
    except FileNotFoundError:
        return None
    except Exception as error:  # on damaged bytes NumPy raises nearly anything
        note(f"{cache} is damaged ({error}) and is rebuilt")
        return None


def _decode_and_store(
    paths: Sequence[str], size: int, cache: Path, key: str, skip_broken: bool
) -> tuple[np.ndarray, np.ndarray]:
    note(f"decoding {len(paths)} images, to cache them in {cache}")
    images, reasons = _decode(paths, size, skip_broken)
    fresh = cache.with_name(f".{cache.name}.{os.getpid()}")
    try:
        with open(fresh, "wb") as file:
            np.savez(file, key=np.array(key), images=images, reasons=reasons)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, cache)
    except OSError as error:
        note(f"{cache} cannot be written ({error.strerror}); the images are decoded again by the next run")
    finally:
        discard(fresh)
    return images, reasons


def _decode(paths: Sequence[str], size: int, skip_broken: bool) -> tuple[np.ndarray, np.ndarray]:
    images = np.zeros((len(paths), size, size, 3), np.uint8)
    reasons = [""] * len(paths)
    with silent_pillow():
        for i, path in enumerate(paths):
            try:
                pixels = read_pixels(path)
                if pixels.shape != (size, size, 3):
                    height, width, _ = pixels.shape
                    raise BrokenImageError(f"{path} has {width}x{height} pixels, expected {size}x{size}; replace it")
                images[i] = pixels.numpy()
            except BrokenImageError as error:
                reasons[i] = str(error)
                if not skip_broken:
                    raise _first({path: reasons[i]}) from None
    return images, np.array(reasons)
