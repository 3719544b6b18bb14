"""In which order a network keeps the numbers of a feature map, and how that becomes (B, C, H, W)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isqrt

from torch import Tensor

Grid = tuple[int, int]
MOST_PREFIX_TOKENS = 16


@dataclass(frozen=True)
class Layout:
    """Attributes:
    kind: "nchw", "nhwc", or "tokens": (B, N, C).
    grid: height and width that the tokens make up.
    prefix: number of tokens before them, such as a class token, that are no part of the map.
    """

    kind: str
    grid: Grid = (0, 0)
    prefix: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        """The map (B, C, H, W); a view of `x`."""
        if self.kind == "nhwc":
            return x.permute(0, 3, 1, 2)
        if self.kind == "tokens":
            return x[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid)
        return x

    def size(self, x: Tensor) -> Grid:
        """Height and width of the map."""
        height, width = self.grid if self.kind == "tokens" else x.shape[1:3] if self.kind == "nhwc" else x.shape[2:]
        return height, width


NCHW, NHWC = Layout("nchw"), Layout("nhwc")


def layouts_of(x: Tensor, grids: Iterable[Grid] = ()) -> list[Layout]:
    """The layouts in which `x` may be a square map, the likeliest first; none for what is no map.

    Args:
        grids: sizes of maps that the network has computed before, which its tokens may make up.
    """
    if x.ndim == 4:
        square = x.shape[2] == x.shape[3], x.shape[1] == x.shape[2]
        return [layout for layout, fits in zip((NCHW, NHWC), square) if fits]
    if x.ndim != 3:
        return []
    count = x.shape[1]
    known = [(count - h * w, (h, w)) for h, w in grids if 0 <= count - h * w <= MOST_PREFIX_TOKENS]
    if known:
        prefix, grid = min(known)
        return [Layout("tokens", grid, prefix)]
    side = isqrt(count)
    return [Layout("tokens", (side, side))] if side * side == count else []
