"""Random crops, rotations and mirrorings of whole batches of small uint8 images, as in torchvision.

All bit for bit, but for `ResizedCrop`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import to_device
from .boxes import UNIFORMS, random_boxes


class Augment(Protocol):
    """A random augmentation of a batch of training images. A frozen dataclass: its repr identifies it in cache keys.

    One whose images have another size than before has the attribute `size`, their height and width; one whose `apply`
    reads its last draws on the CPU has `host_draws`, the number of these.
    """

    @property
    def variants(self) -> int | None:
        """Number of different results for one image; None if they are too many to be numbered."""

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """The random draws for `count` images: tensors (count, ...) on the CPU."""

    def apply(self, images: Tensor, *draws: Tensor) -> Tensor:
        """Images (B, H, W, C) uint8, augmented by their draws (B, ...)."""

    def variant(self, *draws: Tensor) -> Tensor:
        """(B,) int64 in [0, variants): the same number on the same image gives the same result."""


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, mirrored: Tensor, padding: int) -> Tensor:
    """Pad with zeros, crop every image to its old size at its own offset, mirror some left to right.

    Args:
        images: (B, H, W, C).
        top: (B,) int64 in [0, 2 * padding], the first row of the padded image to keep.
        left: (B,) int64, likewise the first column.
        mirrored: (B,) bool.

    Returns:
        (B, H, W, C), as torchvision's RandomCrop(H, padding) and RandomHorizontalFlip give for these draws.
    """
    height, width = images.shape[1:3]
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    # Every crop of every image, as a view; picking one of each is one operation. On a GPU, where each costs the host
    # more than the arithmetic takes, this matters more than the two passes that mirror all images.
    crops = padded.unfold(1, height, 1).unfold(2, width, 1).permute(0, 1, 2, 4, 5, 3)
    picked = crops[torch.arange(len(images), device=images.device), top, left]
    return torch.where(mirrored[:, None, None, None], picked.flip(2), picked)


def rotation(degrees: Tensor, height: int, width: int) -> Tensor:
    """The affine map from rotated to source pixels, in Pillow's fixed point: (N, 6) int32 in units of 2^-16 pixels.

    The rotated pixel at row y and column x is the source pixel at column m0 + m1 x + m2 y and row m3 + m4 x + m5 y,
    both rounded down.

    Args:
        degrees: (N,) float64, counter-clockwise, around the centre.
    """
    angle = degrees.double().neg().deg2rad()
    cos, sin = angle.cos(), angle.sin()
    x, y = width / 2, height / 2
    start_x = x - x * cos - y * sin + (cos + sin) / 2  # plus half a step, to the first pixel's centre
    start_y = y + x * sin - y * cos + (cos - sin) / 2
    return (torch.stack([start_x, cos, sin, start_y, -sin, cos], dim=1) * 65536 + 0.5).floor().int()


def rotate_and_flip(images: Tensor, matrix: Tensor, mirrored: Tensor) -> Tensor:
    """Rotate every image by its own `rotation`, black outside the source, then mirror some left to right.

    Args:
        images: (B, H, W, C) uint8, H and W below 2^15.
        matrix: (B, 6) int32.
        mirrored: (B,) bool.

    Returns:
        (B, H, W, C), as torchvision's RandomRotation and RandomHorizontalFlip give for PIL images.
    """
    count, height, width, channels = images.shape
    x = _columns(width, mirrored).int()[:, None, :]
    y = torch.arange(height, device=images.device, dtype=torch.int32)[:, None]
    m0, m1, m2, m3, m4, m5 = matrix[:, :, None, None].unbind(1)
    column, row = m0 + m1 * x + m2 * y >> 16, m3 + m4 * x + m5 * y >> 16
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    image = torch.arange(count, device=images.device)[:, None, None]
    pixel = torch.where(inside, (image * height + row) * width + column, 0)
    return images.reshape(-1, channels).index_select(0, pixel.view(-1)).view(images.shape) * inside[..., None]


def _columns(width: int, mirrored: Tensor) -> Tensor:
    """(B, W) column indices 0, 1, ..., reversed where mirrored."""
    steps = torch.arange(width, device=mirrored.device)
    return torch.where(mirrored[:, None], width - 1 - steps, steps)


@dataclass(frozen=True)
class CropFlip:
    """Torchvision's RandomCrop(size, padding) and, if `flip`, its RandomHorizontalFlip()."""

    padding: int = 4
    flip: bool = True

    @property
    def variants(self) -> int:
        """Offsets of the crop, times two with the flip."""
        return (2 * self.padding + 1) ** 2 * (2 if self.flip else 1)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """First row and column (count,) int64 of each crop, and whether it is mirrored."""
        top, left = torch.randint(2 * self.padding + 1, (2, count), generator=generator)
        return top, left, torch.rand(count, generator=generator) < (0.5 if self.flip else 0.0)

    def apply(self, images: Tensor, *draws: Tensor) -> Tensor:
        """See `crop_and_flip`."""
        top, left, mirrored = draws
        return crop_and_flip(images, top, left, mirrored, self.padding)

    def variant(self, *draws: Tensor) -> Tensor:
        """The crop's offset, and whether it is mirrored, as one number."""
        top, left, mirrored = draws
        offset = top * (2 * self.padding + 1) + left
        return offset * 2 + mirrored if self.flip else offset


@dataclass(frozen=True)
class RotateFlip:
    """Torchvision's RandomRotation(degrees) of square images of `size` pixels, and its RandomHorizontalFlip()."""

    degrees: float
    size: int
    variants = None

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The `rotation` (count, 6) of each image, and whether it is mirrored."""
        degrees = torch.empty(count).uniform_(-self.degrees, self.degrees, generator=generator)
        return rotation(degrees, self.size, self.size), torch.rand(count, generator=generator) < 0.5

    def apply(self, images: Tensor, *draws: Tensor) -> Tensor:
        """See `rotate_and_flip`."""
        matrix, mirrored = draws
        return rotate_and_flip(images, matrix, mirrored)

    def variant(self, *draws: Tensor) -> Tensor:
        """Must not be called: `variants` is None."""
        raise AssertionError("rotations are not numbered")


@dataclass(frozen=True)
class ResizedCrop:
    """Torchvision's RandomResizedCrop(size), antialiased, and its RandomHorizontalFlip().

    The pixels are within one level (of 256) of torchvision's, whose arithmetic is that of whole numbers.
    """

    size: int
    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    variants = None

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The uniform numbers (count, UNIFORMS) of each image's part, and whether it is mirrored."""
        uniform = torch.rand((count, UNIFORMS), generator=generator, dtype=torch.float64)
        return uniform, torch.rand(count, generator=generator) < 0.5

    def boxes(self, uniform: Tensor, height: int, width: int) -> Tensor:
        """(B, 4) int64: first row, first column, height and width of each image's part, see `random_boxes`.

        Where no attempt fits, it is the largest central part of an allowed ratio.
        """
        box, found = random_boxes(uniform, height, width, self.area, self.ratio, smaller=False)
        rows = min(height, round(width / self.ratio[0]))
        columns = min(width, round(height * self.ratio[1]))
        central = torch.tensor([(height - rows) // 2, (width - columns) // 2, rows, columns])
        return torch.where(found[:, None], box, to_device(central, box.device))

    def apply(self, images: Tensor, *draws: Tensor) -> Tensor:
        """Images (B, H, W, C) uint8 -> (B, size, size, C)."""
        uniform, mirrored = draws
        count, height, width, channels = images.shape
        top, left, rows, columns = self.boxes(uniform, height, width).unbind(1)
        down, across = _weights(top, rows, self.size, height), _weights(left, columns, self.size, width)
        across = torch.where(mirrored[:, None, None], across.flip(1), across)
        high = (down @ images.reshape(count, height, -1).float()).view(count, self.size, width, channels)
        wide = across[:, None] @ high  # (B, 1, size, W) @ (B, size, W, C)
        return wide.round_().clamp_(0, 255).to(torch.uint8)

    def variant(self, *draws: Tensor) -> Tensor:
        """Must not be called: `variants` is None."""
        raise AssertionError("resized crops are not numbered")


def _weights(start: Tensor, length: Tensor, size: int, pixels: int) -> Tensor:
    """(B, size, pixels) float32: by which each of `size` values is the mean of the pixels in [start, start + length).

    A triangle as wide as the step from value to value, or two pixels wide where that is less than one.
    """
    start, length = start[:, None, None].float(), length[:, None, None].float()
    step = length / size
    place = torch.arange(pixels, device=start.device) + 0.5
    centre = start + (torch.arange(size, device=start.device)[:, None] + 0.5) * step
    weights = (1 - (place - centre).abs() / step.clamp(min=1)).clamp_(min=0)
    weights = weights * ((place > start) & (place < start + length))
    return weights / weights.sum(dim=2, keepdim=True)
