"""Wide residual networks for CIFAR: pre-activation blocks, three stages of `widen_factor` times 16, 32, 64 channels.

Reference: Zagoruyko and Komodakis 2016, arXiv 1605.07146.
"""

from __future__ import annotations

from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .._residual import conv
from .._staged import Maps, StagedNet, init_weights


class PreactBlock(nn.Module):
    """`skip + conv2(relu(bn2(conv1(a))))`, `a = relu(bn1(x))`; skip is x, or a 1x1 of `a` where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3)
        self.convShortcut = None if in_channels == out_channels else conv(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output, and its input after `bn1`: the pre-activation of the previous block's output."""
        preact = self.bn1(x)
        a = F.relu(preact)
        skip = x if self.convShortcut is None else self.convShortcut(a)
        return skip + self.conv2(F.relu(self.bn2(self.conv1(a)))), preact


class NetworkBlock(nn.Module):
    """`count` blocks in a row, the first with the stride; returns the output, and the input after its BatchNorm."""

    def __init__(self, count: int, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        first = PreactBlock(in_channels, out_channels, stride)
        rest = [PreactBlock(out_channels, out_channels, 1) for _ in range(count - 1)]
        self.layer = nn.ModuleList([first, *rest])

    @property
    def first_bn(self) -> nn.Module:
        """The first BatchNorm that is applied to the stage's input."""
        return self.layer[0].bn1  # type: ignore[return-value]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, preact = self.layer[0](x)
        for block in self.layer[1:]:
            x, _ = block(x)
        return x, preact


class WideResNet(StagedNet):
    """WRN-`depth`-`widen_factor`. `feats` are the sums between stages, `preact_feats` the same after their BatchNorm.

    Each BatchNorm runs once per forward, so that its running statistics see every batch once.

    Args:
        depth: 6n + 4 for n blocks a stage.
        widen_factor: k of WRN-d-k.
        num_classes: width of the logits.

    Raises:
        ValueError: `depth` is not 6n + 4.
    """

    last_stage = ("block3", "bn1")
    # The BatchNorm between the last of `feats` and the ReLU before the pooling.
    last_norm = "bn1"

    def __init__(self, depth: int, widen_factor: int = 1, num_classes: int = 100) -> None:
        super().__init__()
        count, rest = divmod(depth - 4, 6)
        if rest or count < 1:
            raise ValueError(f"a wide ResNet has 6n + 4 layers (10, 16, 22, ...), not {depth}")
        self.stage_channels = [16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        stem, width1, width2, width3 = self.stage_channels
        self.conv1 = conv(3, stem, 3)
        self.block1 = NetworkBlock(count, stem, width1, stride=1)
        self.block2 = NetworkBlock(count, width1, width2, stride=2)
        self.block3 = NetworkBlock(count, width2, width3, stride=2)
        self.bn1 = nn.BatchNorm2d(width3)
        self.fc = nn.Linear(width3, num_classes)
        self.apply(self.init_weights)

    @staticmethod
    def init_weights(module: nn.Module) -> None:
        """The common `init_weights`, and zero for the classifier's bias."""
        init_weights(module)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward_trunk(self, image: Tensor) -> tuple[Maps, Maps]:
        f0 = self.conv1(image)
        f1, _ = self.block1(f0)
        f2, f1_pre = self.block2(f1)
        return [f0, f1, f2], [f0, f1_pre]

    @staticmethod
    def forward_last_map(stage: Any, x: Tensor) -> tuple[Maps, Maps, Tensor]:
        f3, f2_pre = stage.block3(x)
        f3_pre = stage.bn1(f3)
        return [f3], [f2_pre, f3_pre], F.relu(f3_pre)

    def get_feat_modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.conv1, self.block1, self.block2, self.block3])

    def get_bn_before_relu(self) -> list[nn.Module]:
        return [self.block2.first_bn, self.block3.first_bn, self.bn1]

    def get_stage_channels(self) -> list[int]:
        return self.stage_channels


def wrn_16_1(num_classes: int = 100) -> WideResNet:
    """WRN-16-1."""
    return WideResNet(16, 1, num_classes)


def wrn_16_2(num_classes: int = 100) -> WideResNet:
    """WRN-16-2."""
    return WideResNet(16, 2, num_classes)


def wrn_40_1(num_classes: int = 100) -> WideResNet:
    """WRN-40-1."""
    return WideResNet(40, 1, num_classes)


def wrn_40_2(num_classes: int = 100) -> WideResNet:
    """WRN-40-2."""
    return WideResNet(40, 2, num_classes)
