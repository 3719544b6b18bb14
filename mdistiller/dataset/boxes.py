"""Random rectangles of many images at once, as torchvision's RandomResizedCrop and RandomErasing draw them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Rectangles that are tried for an image.
ATTEMPTS = 10
# Uniform numbers that an image's rectangle takes: area and ratio of each attempt, and its place.
UNIFORMS = 2 * ATTEMPTS + 2


def random_boxes(
    uniform: Tensor, height: int, width: int, area: tuple[float, float], ratio: tuple[float, float], smaller: bool
) -> tuple[Tensor, Tensor]:
    """The first of `ATTEMPTS` rectangles that fits, at a random place, for each image.

    Args:
        uniform: (N, UNIFORMS) float64 in [0, 1), the random draws.
        height, width: of the images, in pixels.
        area: the rectangle's share of the image, uniform in this range.
        ratio: height to width, log-uniform in this range.
        smaller: whether a rectangle as high or as wide as the image does not fit.

    Returns:
        (N, 4) int64, first row, first column, height and width; and (N,) bool, whether any has fitted. Of one that has
        not, the four are those of the first attempt.
    """
    low, high = map(math.log, ratio)
    size = (area[0] + (area[1] - area[0]) * uniform[:, :ATTEMPTS]) * (height * width)
    shape = (low + (high - low) * uniform[:, ATTEMPTS:-2]).exp()
    rows, columns = (size * shape).sqrt().round().long(), (size / shape).sqrt().round().long()
    fits = (rows > 0) & (columns > 0) if not smaller else torch.ones_like(rows, dtype=torch.bool)
    fits &= (rows <= height - smaller) & (columns <= width - smaller)
    first = fits.byte().argmax(dim=1, keepdim=True)
    rows, columns = rows.gather(1, first)[:, 0], columns.gather(1, first)[:, 0]
    top = (uniform[:, -2] * (height - rows + 1)).long()
    left = (uniform[:, -1] * (width - columns + 1)).long()
    return torch.stack([top, left, rows, columns], dim=1), fits.any(dim=1)


def inside(box: Tensor, height: int, width: int) -> Tensor:
    """(B, 1, height, width) bool: the pixels in each image's `box` (B, 4), see `random_boxes`."""
    top, left, rows, columns = box[:, :, None].unbind(1)
    y, x = (torch.arange(count, device=box.device) for count in (height, width))
    in_rows, in_columns = (y >= top) & (y < top + rows), (x >= left) & (x < left + columns)
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]
