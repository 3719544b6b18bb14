"""Images of any size as a network sees them: the validation view that it was made for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from yacs.config import CfgNode as CN

from ..errors import UserError
from ..models.native import NativeInput, native_input
from .image_file import read_pixels, to_pixels

# Up to this size in pixels, images are cropped as CIFAR's are, and held in memory as the network sees them.
SMALL = 64
# The settings of DATASET that `input_of` reads, and the number of classes.
OF_ANY_SIZE = ("NUM_CLASSES", "IMAGE_SIZE", "MEAN", "STD")

Pixels = Callable[[str], Tensor]


def upright(path: str) -> Tensor:
    """The pixels (H, W, 3) uint8 of an image file, turned as its EXIF block says."""
    return read_pixels(path, upright=True)


def input_of(cfg: CN) -> NativeInput:
    """The images that the student is to see: those that it was made for, or as DATASET.IMAGE_SIZE, MEAN and STD say.

    Raises:
        UserError: no such student, or not three means up to 1 and three standard deviations above 0 and up to 1.
    """
    data = cfg.DATASET
    own = native_input(cfg.DISTILLER.STUDENT, data.IMAGE_SIZE)
    mean, std = (tuple(map(float, values)) for values in (data.MEAN, data.STD))
    if bool(mean) != bool(std):
        given, other = ("MEAN", "STD") if mean else ("STD", "MEAN")
        raise UserError(f"DATASET.{given} {list(mean or std)} without DATASET.{other}: set both, or neither")
    for name, values in (("MEAN", mean), ("STD", std)):
        if values and len(values) != 3:
            raise UserError(f"DATASET.{name} {list(values)} has {len(values)} numbers; give three, one a channel")
        if values and max(values) > 1:
            raise UserError(f"DATASET.{name} {list(values)} is of values in [0, 1]; divide those of 0 to 255 by 255")
    if std and not min(std) > 0:
        raise UserError(f"DATASET.STD {list(std)} must be above 0: the images are divided by it")
    return replace(own, size=data.IMAGE_SIZE or own.size, mean=mean or own.mean, std=std or own.std)


def seen_at(cfg: CN, native: NativeInput) -> CN:
    """The configuration whose images are seen as networks with the input `native` see them."""
    other = cfg.clone()
    other.defrost()
    data = other.DATASET
    data.IMAGE_SIZE, data.MEAN, data.STD = native.size, list(native.mean), list(native.std)
    return other


def resized_size(native: NativeInput) -> int:
    """The length in pixels to which validation resizes the short side, of which it keeps the centre."""
    return int(native.size / native.crop + 1e-4)  # as 224 / (224 / 232) is not quite 232


@dataclass(frozen=True)
class ValView:
    """The centre crop of an image, (S, S, 3) uint8: resized by Pillow, as for published accuracies.

    Attributes:
        native: size S, crop share and interpolation.
        pixels: path -> (H, W, 3) uint8.
    """

    native: NativeInput
    pixels: Pixels = upright

    @cached_property
    def _crop(self) -> v2.Compose:
        resize = v2.Resize(resized_size(self.native), interpolation=InterpolationMode(self.native.interpolation))
        return v2.Compose([resize, v2.CenterCrop(self.native.size)])

    def __call__(self, path: str) -> Tensor:
        return to_pixels(self._crop(Image.fromarray(self.pixels(path).numpy())))
