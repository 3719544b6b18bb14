"""The narrow ResNets of CIFAR: three stages of basic blocks on 32x32, 16x16 and 8x8 maps.

Reference: He et al. 2016, arXiv 1512.03385, section 4.2; the x4 widths: Tian et al. 2020, arXiv 1910.10699.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .._residual import BasicBlock, Stage, conv
from .._staged import Maps, StagedNet

NARROW = (16, 16, 32, 64)
WIDE = (32, 64, 128, 256)


class ResNet(StagedNet):
    """A residual network of `depth` layers: stem, three stages, linear classifier.

    Args:
        depth: 6n + 2 for n blocks a stage.
        channels: of the stem and the three stages.
        num_classes: width of the logits.

    Raises:
        ValueError: `depth` is not 6n + 2.
    """

    last_stage = ("layer3",)

    def __init__(self, depth: int, channels: Sequence[int] = NARROW, num_classes: int = 100) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"a CIFAR ResNet has 6n + 2 layers (8, 14, 20, ...), not {depth}")
        self.stage_channels = list(channels)
        stem, width1, width2, width3 = channels
        self.conv1 = conv(3, stem, 3)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layer1 = Stage(BasicBlock, blocks, stem, width1)
        self.layer2 = Stage(BasicBlock, blocks, width1, width2, stride=2)
        self.layer3 = Stage(BasicBlock, blocks, width2, width3, stride=2)
        self.fc = nn.Linear(width3, num_classes)
        self.apply(self.init_weights)

    def forward_trunk(self, image: Tensor) -> tuple[Maps, Maps]:
        f0 = F.relu(self.bn1(self.conv1(image)))
        f1, f1_pre = self.layer1(f0)
        f2, f2_pre = self.layer2(f1)
        return [f0, f1, f2], [f0, f1_pre, f2_pre]

    @staticmethod
    def forward_last_map(stage: Any, x: Tensor) -> tuple[Maps, Maps, Tensor]:
        f3, f3_pre = stage.layer3(x)
        return [f3], [f3_pre], f3

    def get_feat_modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.conv1, self.bn1, self.layer1, self.layer2, self.layer3])

    def get_bn_before_relu(self) -> list[nn.Module]:
        return [self.layer1.last_bn, self.layer2.last_bn, self.layer3.last_bn]

    def get_stage_channels(self) -> list[int]:
        return self.stage_channels


def resnet8(num_classes: int = 100) -> ResNet:
    """ResNet-8, one block a stage."""
    return ResNet(8, NARROW, num_classes)


def resnet14(num_classes: int = 100) -> ResNet:
    """ResNet-14, two blocks a stage."""
    return ResNet(14, NARROW, num_classes)


def resnet20(num_classes: int = 100) -> ResNet:
    """ResNet-20, three blocks a stage."""
    return ResNet(20, NARROW, num_classes)


def resnet32(num_classes: int = 100) -> ResNet:
    """ResNet-32, five blocks a stage."""
    return ResNet(32, NARROW, num_classes)


def resnet44(num_classes: int = 100) -> ResNet:
    """ResNet-44, seven blocks a stage."""
    return ResNet(44, NARROW, num_classes)


def resnet56(num_classes: int = 100) -> ResNet:
    """ResNet-56, nine blocks a stage."""
    return ResNet(56, NARROW, num_classes)


def resnet110(num_classes: int = 100) -> ResNet:
    """ResNet-110, eighteen blocks a stage."""
    return ResNet(110, NARROW, num_classes)


def resnet8x4(num_classes: int = 100) -> ResNet:
    """ResNet-8 with stages four times as wide (the stem twice)."""
    return ResNet(8, WIDE, num_classes)


def resnet32x4(num_classes: int = 100) -> ResNet:
    """ResNet-32 with stages four times as wide (the stem twice)."""
    return ResNet(32, WIDE, num_classes)
