"""MobileNetV2 of full width for Tiny-ImageNet's 64x64 images: `mobilenetv2_tinyimagenet`."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .._network import Network
from .mobilenetv2 import InvertedResidual, last_bn


class TinyBottleneck(InvertedResidual):
    """`InvertedResidual` with ReLU6 and biases."""

    body_name = "residual"

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__(in_channels, out_channels, stride, expansion, bias=True, act=nn.ReLU6)


def _stage(in_channels: int, out_channels: int, repeats: int, stride: int) -> nn.Sequential:
    first = TinyBottleneck(in_channels, out_channels, stride, expansion=6)
    rest = [TinyBottleneck(out_channels, out_channels, 1, expansion=6) for _ in range(repeats - 1)]
    return nn.Sequential(first, *rest)


class MobileNetV2(Network):
    """MobileNetV2 for 64x64 images, with five features: the stem, stages 2 to 4, and the last 1x1 convolution.

    Pre-activations: the BatchNorm's output of the stem and of the last convolution, which ReLU6 follows; stages 2
    to 4 end in a linear projection, so theirs is the feature itself (see `.mobilenetv2.MobileNetV2`).

    The stem pads a 1x1 convolution by one pixel, as the public checkpoints expect: 64x64 becomes 66x66.

    Args:
        num_classes: C.

    Reference: Sandler et al. 2018, arXiv 1801.04381.
    """

    classifier_name = "conv2"

    def __init__(self, num_classes: int = 200) -> None:
        super().__init__()
        self.pre = nn.Sequential(nn.Conv2d(3, 32, 1, padding=1), nn.BatchNorm2d(32))
        self.stage1 = TinyBottleneck(32, 16, 1, expansion=1)
        self.stage2 = _stage(16, 24, repeats=2, stride=2)
        self.stage3 = _stage(24, 32, repeats=3, stride=2)
        self.stage4 = _stage(32, 64, repeats=4, stride=2)
        self.stage5 = _stage(64, 96, repeats=3, stride=1)
        self.stage6 = _stage(96, 160, repeats=3, stride=1)
        self.stage7 = TinyBottleneck(160, 320, 1, expansion=6)
        self.conv1 = nn.Sequential(nn.Conv2d(320, 1280, 1), nn.BatchNorm2d(1280))
        self.conv2 = nn.Conv2d(1280, num_classes, 1)

    def get_feat_modules(self) -> nn.ModuleList:
        """The modules up to the last feature, in order."""
        stages = [self.stage1, self.stage2, self.stage3, self.stage4, self.stage5, self.stage6, self.stage7]
        return nn.ModuleList([self.pre, *stages, self.conv1])

    def get_bn_before_relu(self) -> list[nn.Module]:
        """The last BatchNorm of each feature but the stem's."""
        return [last_bn(self.stage2), last_bn(self.stage3), last_bn(self.stage4), self.conv1[1]]

    def get_stage_channels(self) -> list[int]:
        """Channels of each feature."""
        return [32, 24, 32, 64, 1280]

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """(B, 3, H, W) -> logits (B, C), and the features."""
        stem = self.pre(x)
        feat0 = F.relu6(stem)
        feat1 = self.stage2(self.stage1(feat0))
        feat2 = self.stage3(feat1)
        feat3 = self.stage4(feat2)
        last = self.conv1(self.stage7(self.stage6(self.stage5(feat3))))
        feat4 = F.relu6(last)
        pooled = F.adaptive_avg_pool2d(feat4, 1)
        return self.conv2(pooled).flatten(1), {
            "feats": [feat0, feat1, feat2, feat3, feat4],
            "preact_feats": [stem, feat1, feat2, feat3, last],
            "last_map": feat4,
            "pooled_feat": pooled.flatten(1),
        }


def mobilenetv2_tinyimagenet(num_classes: int = 200) -> MobileNetV2:
    """Tiny-ImageNet's MobileNetV2: width 1."""
    return MobileNetV2(num_classes)
