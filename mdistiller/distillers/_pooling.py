"""Average pooling to a size, whose gradients are deterministic on every device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def average_pool(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The mean of each of h x w cells of a map: (B, C, H, W) -> (B, C, h, w), as `adaptive_avg_pool2d`.

    Cell (i, j) has rows floor(i H / h) to ceil((i + 1) H / h), and columns likewise, so that cells overlap where h does
    not divide H, and repeat where the map is smaller. CUDA's adaptive pooling has no deterministic gradients, and stops
    a run under EXPERIMENT.DETERMINISTIC.
    """
    (height, width), (rows, columns) = x.shape[-2:], size
    if (height, width) == (rows, columns):
        return x
    if (rows, columns) == (1, 1):
        return x.mean((-2, -1), keepdim=True)
    if height % rows == 0 and width % columns == 0:
        return F.avg_pool2d(x, (height // rows, width // columns))
    x = torch.stack([x[:, :, a:b].mean(2) for a, b in _cells(height, rows)], dim=2)
    return torch.stack([x[:, :, :, a:b].mean(3) for a, b in _cells(width, columns)], dim=3)


def pool_larger(x: Tensor, size: Sequence[int]) -> Tensor:
    """`average_pool` to the height and the width of `size`, each where the map's own is larger."""
    return average_pool(x, (min(x.shape[-2], size[0]), min(x.shape[-1], size[1])))


def _cells(size: int, n: int) -> list[tuple[int, int]]:
    return [(i * size // n, -(-(i + 1) * size // n)) for i in range(n)]
