"""Image files: read safely, and with an error that names the file."""

from __future__ import annotations

import errno
import os
import stat
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..console import one_line, warn
from ..errors import UserError
from .formats import formats_of
from .pixels import UnknownWhiteError, to_rgb
from .worker_failures import RefusedError

# Largest ratio of long to short side. A 1x65,500 image, resized to a short side of 256 pixels, would take 12 GB.
SLIMMEST = 100


class BrokenImageError(UserError):
    """A file that cannot be read as an image; names it."""


@contextmanager
def silent_pillow() -> Iterator[None]:
    """Ignore Pillow's warnings, such as those on odd metadata; its warning of a too large image becomes an error.

    Not thread-safe.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


@contextmanager
def _opened(path: str, content: bytes | None = None) -> Iterator[Image.Image]:
    """Open an image and read its header only; any error here or in the `with` block names the file.

    Args:
        content: what the file would hold, where the image is none; then `path` is its name.
    """
    try:
        if content is None and not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("it is not a regular file")  # opening a named pipe would block
        with Image.open(path if content is None else BytesIO(content), formats=formats_of(path)) as image:
            short, long = sorted(image.size)
            if long > SLIMMEST * short:
                raise OSError(f"it has {image.width}x{image.height} pixels, too narrow to resize")
            yield image
    except Exception as error:  # on damaged bytes the decoders raise nearly anything
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            limit = "raise the limit, such as by `ulimit -n 65536`"
            raise RefusedError(f"cannot open {path}: {error.strerror}; {limit}") from None  # the file may be intact
        reason = one_line(error) or type(error).__name__
        known = isinstance(error, UnknownWhiteError)
        remedy = "save it with 8 or 16 bits a channel" if known else "put an intact copy there"
        raise BrokenImageError(f"{path} cannot be read as an image ({reason}); {remedy}") from error


def read_image(path: str, upright: bool = False, content: bytes | None = None) -> Image.Image:
    """The image of a file, of whatever mode, as RGB (`pixels.to_rgb`); of several frames, the first one.

    Args:
        content: an image file's bytes, which are read in place of `path`; that is then the image's name.
        upright: turn and mirror it as its EXIF block says, as viewers do. The original's data sets are read without,
            as torchvision's loader reads them. (Pillow itself turns TIFF files, always.)

    Raises:
        BrokenImageError: the file is missing, broken, too large or too narrow, or its white is not known.
        RefusedError: too many files are open.
    """
    with _opened(path, content) as image:
        image.load()
        rgb = to_rgb(image)
        return _upright(rgb) if upright else rgb


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # on damaged bytes Pillow raises nearly anything; viewers show such an image as it is stored
        return image


def read_pixels(path: str, upright: bool = False, content: bytes | None = None) -> Tensor:
    """The same image as (H, W, 3) uint8."""
    return to_pixels(read_image(path, upright, content))


def decoded_bytes(path: str, content: bytes | None = None) -> int:
    """The size of an image's pixels in memory, in bytes, by its header alone; see `read_image`.

    Raises:
        BrokenImageError, RefusedError: see `read_image`.
    """
    with _opened(path, content) as image:
        return 3 * image.width * image.height


def to_pixels(image: Image.Image) -> Tensor:
    """(H, W, 3) uint8 of an RGB image."""
    return torch.from_numpy(np.array(image))


def warn_of_broken(broken: Mapping[str, str], count: int, what: str) -> None:
    """Warn in one line how many of `count` images are `broken` (by path), and name the first ones."""
    names = ", ".join(sorted(broken)[:3]) + (", ..." if len(broken) > 3 else "")
    warn(f"{len(broken)} of {count} images are broken and {what}: {names}")
