"""Image files of a user's own as a split: held in memory if they are few, else read by workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from yacs.config import CfgNode as CN

from ..errors import UserError
from ._base import Split
from .augment import CropFlip
from .augmentation import FileView, padding_of, transform_of
from .folders import ImageFiles
from .held import GIB, Held, decoded, fits
from .image_file import BrokenImageError, decoded_bytes, warn_of_broken
from .in_memory import ImageArray
from .views import SMALL, Pixels, ValView, input_of, upright


def split_of(
    files: Sequence[tuple[str, int]], cfg: CN, skip_broken: bool = False, once: bool = False,
    class_names: Sequence[str] = (), pixels: Pixels = upright, bytes_of: Callable[[str], int] = decoded_bytes,
    mirror: bool = True,
) -> Split:  # fmt: skip
    """The images of (path, label) pairs, as the student of `cfg` is to see them.

    Up to `views.SMALL` pixels, they are held in memory as the student sees them; larger ones as they are. Where either
    takes more than DATASET.MEMORY_GIB, files are read. All views have the same bits in both cases.

    Args:
        once: every image is seen once, so that holding them saves nothing.
        pixels: path -> (H, W, 3) uint8; where the images are no files, of the names that stand for paths.
        bytes_of: path -> the size of its pixels in memory, in bytes.
        mirror: whether the augmentation may mirror them.

    Raises:
        BrokenImageError: an image that is to be held is broken, unless `skip_broken`.
    """
    native, gib = input_of(cfg), cfg.DATASET.MEMORY_GIB
    paths = [path for path, _ in files]
    if native.size <= SMALL:
        view, augment = ValView(native, pixels), CropFlip(padding_of(native.size), flip=mirror)
        if len(paths) * 3 * native.size**2 <= gib * GIB:
            return _array(files, view, augment, skip_broken, class_names)
        form = native.mean, native.std, skip_broken, class_names
        return ImageFiles.of(list(files), view, view, *form, augment)
    if not once and fits(paths, gib, bytes_of):
        pixels = Held(paths, pixels, skip_broken)
    crop = transform_of("resized_crop", native.size, native.interpolation, mirror)
    views = FileView(pixels, crop, interpolation=native.interpolation), ValView(native, pixels)
    return ImageFiles.of(list(files), *views, native.mean, native.std, skip_broken, class_names)


def _array(
    files: Sequence[tuple[str, int]], view: ValView, augment: CropFlip, skip_broken: bool, class_names: Sequence[str]
) -> ImageArray:
    """Small images as the network sees them, in memory."""
    images: list[Tensor] = []
    labels: list[int] = []
    broken: dict[str, str] = {}
    for (path, label), image in zip(files, decoded([path for path, _ in files], view)):
        if isinstance(image, BrokenImageError):
            broken[path] = str(image)
        else:
            images.append(image)
            labels.append(label)
    if broken and not skip_broken:
        raise BrokenImageError(next(iter(broken.values())) + ", or set DATASET.SKIP_BROKEN True")
    if not images:
        raise UserError(f"none of the {len(files)} images can be read: {next(iter(broken.values()))}")
    if broken:
        warn_of_broken(broken, len(files), "were left out (DATASET.SKIP_BROKEN)")
    native = view.native
    return ImageArray(torch.stack(images), torch.tensor(labels), native.mean, native.std, augment, class_names)
