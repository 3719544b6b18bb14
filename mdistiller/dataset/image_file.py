"""Image files: read safely, and with an error that names the file."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..console import one_line, warn
from ..errors import UserError

# What the extensions that torchvision takes for images can hold. Pillow knows more, and starts programs for some.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")
# Long side over short side. Resized to 256 pixels by its short side, one of 1x65,500 would take 12 GB.
SLIMMEST = 100


class BrokenImageError(UserError):
    """A file that cannot be read as an image; names it."""


@contextmanager
def silent_pillow() -> Iterator[None]:
    """Without Pillow's warnings, of odd metadata and the like; that of an image too large becomes an error.

    Not for use in several threads at a time.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """The image of which only the header is read; what goes wrong here or inside is told with the file's name."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("it is no plain file")  # a named pipe would be waited for
        with Image.open(path, formats=FORMATS) as image:
            short, long = sorted(image.size)
            if long > SLIMMEST * short:
                raise OSError(f"it has {image.width}x{image.height} pixels, which no resizing by the short side bears")
            yield image
    except Exception as error:  # on damaged bytes the decoders raise nearly anything
        reason = one_line(error) or type(error).__name__
        raise BrokenImageError(f"{path} cannot be read as an image ({reason}); put the whole file there") from error


def read_image(path: str) -> Image.Image:
    """The RGB image of a file, grey ones included.

    Raises:
        BrokenImageError: the file is missing, broken, too large or too slim.
    """
    with _opened(path) as image:
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")


def read_pixels(path: str) -> Tensor:
    """The same as (H, W, 3) uint8."""
    return to_pixels(read_image(path))


def to_pixels(image: Image.Image) -> Tensor:
    """(H, W, 3) uint8 of an RGB image."""
    return torch.from_numpy(np.array(image))


def warn_of_broken(broken: Mapping[str, str], count: int, what: str) -> None:
    """One line that says how many of `count` images are `broken` (by path) and names the first."""
    names = ", ".join(sorted(broken)[:3]) + (", ..." if len(broken) > 3 else "")
    warn(f"{len(broken)} of {count} images are broken and {what}: {names}")
