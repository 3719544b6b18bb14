"""FixMatch's strong augmentation of images in memory, each with operations and strengths of its own.

Two operations of `OPERATIONS`, drawn with replacement, each with a strength that is uniform between its two ends, then
a grey square. Pixels are those that Pillow gives: of single images, and of batches on the training device.

Reference: Sohn et al. 2020, arXiv 2001.07685, appendix D; the square's size and colour are those of MLKD's recipe (Jin
et al. 2023), which took them from later implementations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .augment import rotate_and_flip, rotation
from .batch import to_device

GREY = (125, 123, 114)
_COUNT = 2  # operations on an image
_LARGEST_SQUARE = 0.5  # of the image's size
# Of an image: the numbers of its operations, their strengths, and size, column and row of the square.
DRAWS = 2 * _COUNT + 3

# (images (B, H, W, 3) uint8, strengths (B,) float64) -> images.
Operation = Callable[[Tensor, Tensor], Tensor]


def draw(count: int, generator: torch.Generator | None = None) -> Tensor:
    """The draws for `count` images, (count, DRAWS) float64: the operations' numbers, and else uniform in [0, 1)."""
    operations = torch.randint(len(OPERATIONS), (count, _COUNT), generator=generator)
    uniform = torch.rand((count, DRAWS - _COUNT), generator=generator, dtype=torch.float64)
    return torch.cat([operations.double(), uniform], dim=1)


def apply(images: Tensor, draws: Tensor) -> Tensor:
    """Images (B, H, W, 3) uint8, each changed by its own `draws` (B, DRAWS), which are read on the CPU."""
    numbers, strengths, square = draws.split([_COUNT, _COUNT, DRAWS - 2 * _COUNT], dim=1)
    for number, strength in zip(numbers.long().unbind(1), strengths.unbind(1)):
        images = _operated(images, number, strength)
    return grey_square(images, *to_device(square, images.device).unbind(1))


def _operated(images: Tensor, numbers: Tensor, uniform: Tensor) -> Tensor:
    """Each image changed by one operation; images of the same one are changed together."""
    order = numbers.argsort(stable=True)
    counts = numbers.bincount(minlength=len(OPERATIONS)).tolist()
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    ends = torch.tensor([ends for _, *ends in OPERATIONS.values()], dtype=torch.float64)[numbers[order]]
    strengths = to_device(torch.lerp(ends[:, 0], ends[:, 1], uniform[order]), images.device)
    order, back = to_device(order, images.device), to_device(back, images.device)
    groups = zip(OPERATIONS.values(), images.index_select(0, order).split(counts), strengths.split(counts))
    changed = [operation(group, strength) for (operation, *_), group, strength in groups if len(group)]
    return torch.cat(changed).index_select(0, back)


def grey_square(images: Tensor, size: Tensor, column: Tensor, row: Tensor) -> Tensor:
    """A square of `GREY` in each image, cut off at its edges.

    Args:
        images: (B, H, W, 3) uint8.
        size: (B,) in [0, 1), of the largest side, which is half of the image's width.
        column, row: (B,) in [0, 1), the centre as a share of width and height.

    Returns:
        (B, H, W, 3), as Pillow draws the rectangle, whose last column and row are still grey.
    """
    height, width = images.shape[1:3]
    side = size * _LARGEST_SQUARE * width
    inside = torch.ones((), dtype=torch.bool, device=images.device)
    for centre, pixels, shape in ((column, width, (-1, 1, width, 1)), (row, height, (-1, height, 1, 1))):
        first = (centre * pixels - side / 2).clamp(min=0).floor()
        last = (first + side).clamp(max=pixels).floor()
        place = torch.arange(pixels, device=images.device)
        inside = inside & ((place >= first[:, None]) & (place <= last[:, None])).view(shape)
    grey = torch.empty((3,), dtype=torch.uint8, device=images.device)
    for channel, value in enumerate(GREY):
        grey[channel].fill_(value)  # a tensor made of the numbers would be copied to a GPU, which waits
    return torch.where(inside, grey, images)


def _as_it_is(images: Tensor, strength: Tensor) -> Tensor:
    return images


def _looked_up(images: Tensor, table: Tensor) -> Tensor:
    """Each pixel's entry of its image's and channel's own `table` (B, 3, 256)."""
    rows = images.permute(0, 3, 1, 2).flatten(2)
    return table.gather(2, rows.long()).view(-1, 3, *images.shape[1:3]).permute(0, 2, 3, 1).to(torch.uint8)


def _autocontrast(images: Tensor, strength: Tensor) -> Tensor:
    """Each channel's values, stretched to 0 to 255."""
    low, high = images.amin((1, 2), True).double(), images.amax((1, 2), True).double()
    flat = high == low
    scale = to_device(torch.tensor(255.0, dtype=torch.float64), images.device) / (high - low).masked_fill(flat, 1)
    stretched = (images * scale - low * scale).trunc().clamp(0, 255).to(torch.uint8)
    return torch.where(flat, images, stretched)


def _equalize(images: Tensor, strength: Tensor) -> Tensor:
    """Each channel's values, spread so that all are about equally frequent."""
    channels = images.permute(0, 3, 1, 2).flatten(2).long().flatten(0, 1)  # (3 B, H W)
    first = 256 * torch.arange(len(channels), device=images.device)[:, None]
    counts = torch.zeros(len(channels) * 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(0, (channels + first).flatten(), torch.ones_like(channels).flatten())
    counts = counts.view(-1, 256)
    up_to = counts.cumsum(1)
    brightest = counts.gather(1, channels.amax(1, keepdim=True))
    step = (up_to[:, -1:] - brightest) // 255
    table = ((up_to - counts + step // 2) // step.clamp(min=1)).clamp(max=255)
    own = torch.arange(256, device=images.device).expand_as(table)
    return _looked_up(images, torch.where(step == 0, own, table).view(-1, 3, 256))


def _posterize(images: Tensor, strength: Tensor) -> Tensor:
    """The `strength`, rounded down, highest bits of each value."""
    lost = (8 - strength.floor()).to(torch.uint8)[:, None, None, None]
    return images >> lost << lost


def _solarize(images: Tensor, strength: Tensor) -> Tensor:
    """Values from `strength` on are inverted."""
    return torch.where(images < strength[:, None, None, None], images, 255 - images)


def _blended(images: Tensor, dull: Tensor, strength: Tensor) -> Tensor:
    """From the `dull` image (0) to the image itself (1), rounded down."""
    share = strength.float()[:, None, None, None]
    dull = dull.float()
    return (dull + share * (images.float() - dull)).to(torch.uint8)


def _brightness(images: Tensor, strength: Tensor) -> Tensor:
    return _blended(images, torch.zeros_like(images[:, :1, :1]), strength)


def _grey(images: Tensor) -> Tensor:
    """(B, H, W, 1) int32, the brightness of each pixel by ITU-R 601."""
    red, green, blue = images.int().unbind(3)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000 >> 16)[..., None]


def _colour(images: Tensor, strength: Tensor) -> Tensor:
    return _blended(images, _grey(images), strength)


def _contrast(images: Tensor, strength: Tensor) -> Tensor:
    mean = (_grey(images).double().mean((1, 2), keepdim=True) + 0.5).floor()
    return _blended(images, mean, strength)


def _sharpness(images: Tensor, strength: Tensor) -> Tensor:
    """Blended with the image smoothed over 3 x 3 pixels, but for its outermost ones."""
    inner = images.permute(0, 3, 1, 2).float()
    rows = inner[:, :, :-2] + inner[:, :, 1:-1] + inner[:, :, 2:]
    summed = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inner[:, :, 1:-1, 1:-1]
    smooth = F.pad((summed / 13 + 0.5).floor(), (1, 1, 1, 1)).permute(0, 2, 3, 1)
    inside = F.pad(torch.ones_like(summed[:1, 0], dtype=torch.bool), (1, 1, 1, 1))[..., None]
    return _blended(images, torch.where(inside, smooth, images.float()), strength)


def _moved(images: Tensor, matrix: Tensor) -> Tensor:
    """See `augment.rotate_and_flip`: nearest pixels, black outside of the image."""
    return rotate_and_flip(images, matrix, torch.zeros(len(images), dtype=torch.bool, device=images.device))


def _rotate(images: Tensor, strength: Tensor) -> Tensor:
    return _moved(images, rotation(strength, *images.shape[1:3]))


def _affine(images: Tensor, **entries: Tensor) -> Tensor:
    """The pixel at (x, y) is that at (x + right + xy y, down + yx x + y); of the pixels' centres."""
    zero = torch.zeros(len(images), dtype=torch.float64, device=images.device)
    right, xy, down, yx = (entries.get(name, zero) for name in ("right", "xy", "down", "yx"))
    one = zero + 1
    rows = [right + 0.5 + xy / 2, one, xy, down + yx / 2 + 0.5, yx, one]
    return _moved(images, (torch.stack(rows, dim=1) * 65536 + 0.5).floor().int())


# Name -> the operation, and the ends of its strength.
OPERATIONS: dict[str, tuple[Operation, float, float]] = {
    "autocontrast": (_autocontrast, 0, 1),
    "brightness": (_brightness, 0.05, 0.95),
    "colour": (_colour, 0.05, 0.95),
    "contrast": (_contrast, 0.05, 0.95),
    "equalize": (_equalize, 0, 1),
    "identity": (_as_it_is, 0, 1),
    "posterize": (_posterize, 4, 8),
    "rotate": (_rotate, -30, 30),
    "sharpness": (_sharpness, 0.05, 0.95),
    "shear x": (lambda images, s: _affine(images, xy=s), -0.3, 0.3),
    "shear y": (lambda images, s: _affine(images, yx=s), -0.3, 0.3),
    "solarize": (_solarize, 0, 256),
    "translate x": (lambda images, s: _affine(images, right=s * images.shape[2]), -0.3, 0.3),
    "translate y": (lambda images, s: _affine(images, down=s * images.shape[1]), -0.3, 0.3),
}
