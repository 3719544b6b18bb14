"""VGG with BatchNorm for CIFAR: five blocks of 3x3 convolutions and one linear layer.

Reference: Simonyan and Zisserman 2015, arXiv 1409.1556.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .._staged import Maps, StagedNet, init_weights

CHANNELS = (64, 128, 256, 512, 512)


def _block(in_channels: int, out_channels: int, count: int) -> nn.Sequential:
    """`count` times convolution, BatchNorm, ReLU, without the last ReLU: distillers use the map before it."""
    layers: list[nn.Module] = []
    for _ in range(count):
        layers += [nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU()]
        in_channels = out_channels
    return nn.Sequential(*layers[:-1])


@torch.fx.wrap  # a leaf for torch.fx, which cannot trace a branch on the shape
def _halve_large(x: Tensor) -> Tensor:
    """Max-pooled by two if it has 8 rows or more: a 64x64 image is halved once more than one of 32x32."""
    return F.max_pool2d(x, 2) if x.shape[-2] >= 8 else x


class VGG(StagedNet):
    """Five blocks of 64, 128, 256, 512 and 512 channels, global average pooling, linear classifier.

    Maps are halved after each of the first three blocks, and before the last one where they are still 8x8 or larger
    (64x64 images).

    Args:
        counts: convolutions in each of the five blocks.
        num_classes: width of the logits.
    """

    last_stage = ("block4",)
    classifier_name = "classifier"

    def __init__(self, counts: Sequence[int], num_classes: int = 100) -> None:
        super().__init__()
        self.block0 = _block(3, 64, counts[0])
        self.block1 = _block(64, 128, counts[1])
        self.block2 = _block(128, 256, counts[2])
        self.block3 = _block(256, 512, counts[3])
        self.block4 = _block(512, 512, counts[4])
        self.classifier = nn.Linear(512, num_classes)
        self.apply(self.init_weights)

    @staticmethod
    def init_weights(module: nn.Module) -> None:
        """The common `init_weights`, and for the classifier N(0, 0.01^2) for its weights and zero for its bias."""
        init_weights(module)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)

    def forward_trunk(self, image: Tensor) -> tuple[Maps, Maps]:
        f0 = F.relu(self.block0(image))
        feats, preacts = [f0], [f0]
        for block in (self.block1, self.block2, self.block3):
            preacts.append(block(F.max_pool2d(feats[-1], 2)))
            feats.append(F.relu(preacts[-1]))
        return feats, preacts

    @staticmethod
    def forward_last_map(stage: Any, x: Tensor) -> tuple[Maps, Maps, Tensor]:
        f4_pre = stage.block4(_halve_large(x))
        f4 = F.relu(f4_pre)
        return [f4], [f4_pre], f4

    def get_feat_modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.block0, self.block1, self.block2, self.block3, self.block4])

    def get_bn_before_relu(self) -> list[nn.Module]:
        return [block[-1] for block in (self.block1, self.block2, self.block3, self.block4)]

    def get_stage_channels(self) -> list[int]:
        return list(CHANNELS)


def vgg8(num_classes: int = 100) -> VGG:
    """VGG-8: one convolution a block."""
    return VGG((1, 1, 1, 1, 1), num_classes)


def vgg11(num_classes: int = 100) -> VGG:
    """VGG-11 (configuration A)."""
    return VGG((1, 1, 2, 2, 2), num_classes)


def vgg13(num_classes: int = 100) -> VGG:
    """VGG-13 (configuration B)."""
    return VGG((2, 2, 2, 2, 2), num_classes)


def vgg16(num_classes: int = 100) -> VGG:
    """VGG-16 (configuration D)."""
    return VGG((2, 2, 3, 3, 3), num_classes)


def vgg19(num_classes: int = 100) -> VGG:
    """VGG-19 (configuration E)."""
    return VGG((2, 2, 4, 4, 4), num_classes)
