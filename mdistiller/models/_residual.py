"""Residual blocks and stages of them: `relu(f(x) + skip(x))`, returned after and before that ReLU.

Reference: He et al. 2016, arXiv 1512.03385.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias, padded so that only its stride changes the map's size."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)


class Residual(nn.Module):
    """`relu(f(x) + skip(x))`; a block defines f as `residual` and its layers in `build`.

    Args:
        in_channels: of the block's input.
        width: channels inside the block; its output has `width * expansion`.
        stride: 2 halves the map.
        skip_name: what the state dict calls the projection on the skip; it exists only where shapes change.
    """

    expansion: ClassVar[int] = 1
    bn1: nn.BatchNorm2d
    bn2: nn.BatchNorm2d

    def __init__(self, in_channels: int, width: int, stride: int = 1, skip_name: str = "downsample") -> None:
        super().__init__()
        self.skip_name = skip_name
        self.build(in_channels, width, stride)
        out_channels = width * self.expansion
        if stride != 1 or in_channels != out_channels:
            projection = nn.Sequential(conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))
            self.add_module(skip_name, projection)

    def build(self, in_channels: int, width: int, stride: int) -> None:
        """Make the layers of the residual branch."""
        raise NotImplementedError

    def residual(self, x: Tensor) -> Tensor:
        """f(x), without the last activation."""
        raise NotImplementedError

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        """The BatchNorm right before the sum."""
        return self.bn2

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output after and before its last ReLU."""
        skip = self._modules.get(self.skip_name)
        preact = self.residual(x) + (x if skip is None else skip(x))
        return F.relu(preact), preact


class BasicBlock(Residual):
    """Two 3x3 convolutions."""

    def build(self, in_channels: int, width: int, stride: int) -> None:
        self.conv1 = conv(in_channels, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)

    def residual(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))


class Bottleneck(Residual):
    """1x1 to `width`, 3x3 (which carries the stride), 1x1 to `4 * width`."""

    expansion = 4

    def build(self, in_channels: int, width: int, stride: int) -> None:
        self.conv1 = conv(in_channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, width * self.expansion, 1)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)

    def residual(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        return self.bn3


class Stage(nn.Sequential):
    """`count` blocks in a row, the first with the stride; returns the last block's output after and before ReLU."""

    def __init__(
        self,
        block: type[Residual],
        count: int,
        in_channels: int,
        width: int,
        stride: int = 1,
        skip_name: str = "downsample",
    ) -> None:
        rest = [block(width * block.expansion, width, skip_name=skip_name) for _ in range(count - 1)]
        super().__init__(block(in_channels, width, stride, skip_name), *rest)

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        """The BatchNorm right before the stage's last sum."""
        return self[-1].last_bn  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Any:
        preact = x
        for block in self:
            x, preact = block(x)
        return x, preact
