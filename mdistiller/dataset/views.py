"""Images of any size as a network sees them: the validation view that it was made for, and augmented views."""

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
Transform = Callable[[Tensor], Tensor]


def upright(path: str) -> Tensor:
    """The pixels (H, W, 3) uint8 of an image file, turned as its EXIF block says."""
    return read_pixels(path, upright=True)


def input_of(cfg: CN) -> NativeInput:
    """The images that the student is to see: those that it was made for, or as DATASET.IMAGE_SIZE, MEAN and STD say.

    Raises:
        UserError: no such student, or not three means and three standard deviations above 0.
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
    if std and not min(std) > 0:
        raise UserError(f"DATASET.STD {list(std)} must be above 0: the images are divided by it")
    return replace(own, size=data.IMAGE_SIZE or own.size, mean=mean or own.mean, std=std or own.std)


def _mode(interpolation: str) -> InterpolationMode:
    return InterpolationMode(interpolation)


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
        resize = v2.Resize(resized_size(self.native), interpolation=_mode(self.native.interpolation))
        return v2.Compose([resize, v2.CenterCrop(self.native.size)])

    def __call__(self, path: str) -> Tensor:
        return to_pixels(self._crop(Image.fromarray(self.pixels(path).numpy())))


@dataclass(frozen=True)
class FileView:
    """A random view of an image, (S, S, 3) uint8.

    Attributes:
        read: path -> (H, W, 3) uint8 of any size.
        transform: (H, W, 3) -> (S, S, 3), both uint8; its randomness comes from torch's CPU generator.
    """

    read: Pixels
    transform: Transform

    def __call__(self, path: str) -> Tensor:
        return self.transform(self.read(path))


def padding_of(size: int) -> int:
    """By how many pixels small images are padded before they are cropped: 4 for CIFAR's 32."""
    return size // 8


@dataclass(frozen=True)
class DefaultAugment:
    """The augmentation of one image, (H, W, 3) -> (S, S, 3) uint8, without DATASET.AUGMENT.

    Above `SMALL` pixels a random crop of 8 to 100 % of the image's area, resized, and mirrored at random. Else the
    validation view, padded, cropped to its old size and mirrored at random, as `CropFlip` does.

    Attributes:
        mirror: whether to mirror at all.
    """

    native: NativeInput
    mirror: bool = True

    @cached_property
    def _steps(self) -> v2.Compose:
        size, mode = self.native.size, _mode(self.native.interpolation)
        if size > SMALL:
            crop = [v2.RandomResizedCrop(size, interpolation=mode, antialias=True)]
        else:
            resize = v2.Resize(resized_size(self.native), interpolation=mode, antialias=True)
            crop = [resize, v2.CenterCrop(size), v2.RandomCrop(size, padding=padding_of(size))]
        return v2.Compose([*crop, *([v2.RandomHorizontalFlip()] if self.mirror else [])])

    def __call__(self, pixels: Tensor) -> Tensor:
        return self._steps(pixels.permute(2, 0, 1)).permute(1, 2, 0)
