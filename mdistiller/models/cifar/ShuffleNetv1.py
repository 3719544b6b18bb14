"""ShuffleNet with three groups, for 32x32 images: `ShuffleV1`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .._network import Network
from .._staged import global_pool

STEM_CHANNELS = 24


class Bottleneck(nn.Module):
    """Grouped 1x1, channel shuffle, depthwise 3x3, grouped 1x1; added to the input, or concatenated with it.

    At stride 2 the input is average-pooled and its channels are concatenated with the new ones. The value before
    the last ReLU is returned too.

    Reference: Zhang et al. 2017, arXiv 1707.01083, figure 2.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int) -> None:
        super().__init__()
        self.stride = stride
        self.groups = groups
        new_channels = out_channels - in_channels if stride == 2 else out_channels
        hidden = new_channels // 4
        # The stem is too narrow to be split into groups (section 3.2).
        first_groups = 1 if in_channels == STEM_CHANNELS else groups
        self.shuffle = nn.ChannelShuffle(first_groups)
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, groups=first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, new_channels, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(new_channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C_in, H, W) -> (B, C_out, H / stride, W / stride) after and before the ReLU."""
        out = self.shuffle(F.relu(self.bn1(self.conv1(x))))
        # Unlike the paper's, this network has a ReLU after the 3x3 convolution too.
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.stride == 2:
            preact = torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], dim=1)
        else:
            preact = out + x
        return F.relu(preact), preact


def _stage(in_channels: int, out_channels: int, repeats: int, groups: int) -> nn.Sequential:
    first = Bottleneck(in_channels, out_channels, 2, groups)
    return nn.Sequential(first, *(Bottleneck(out_channels, out_channels, 1, groups) for _ in range(repeats - 1)))


def _run(stage: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    """The stage's output after and before its last ReLU."""
    preact = x
    for block in stage:
        x, preact = block(x)
    return x, preact


class ShuffleNet(Network):
    """ShuffleNet for 32x32 images (or larger), with four features: the stem and the three stages.

    The stem's pre-activation is its feature, after the ReLU, as in the pinned values.

    Args:
        num_classes: C.
        groups: of the 1x1 convolutions.
        channels: of the three stages.
        repeats: blocks of the three stages.

    Reference: Zhang et al. 2017, arXiv 1707.01083.
    """

    classifier_name = "linear"

    def __init__(
        self,
        num_classes: int = 100,
        groups: int = 3,
        channels: tuple[int, int, int] = (240, 480, 960),
        repeats: tuple[int, int, int] = (4, 8, 4),
    ) -> None:
        super().__init__()
        self.stage_channels = [STEM_CHANNELS, *channels]
        self.conv1 = nn.Conv2d(3, STEM_CHANNELS, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS)
        self.layer1 = _stage(STEM_CHANNELS, channels[0], repeats[0], groups)
        self.layer2 = _stage(channels[0], channels[1], repeats[1], groups)
        self.layer3 = _stage(channels[1], channels[2], repeats[2], groups)
        self.linear = nn.Linear(channels[2], num_classes)

    def get_feat_modules(self) -> nn.ModuleList:
        """The modules up to the last feature, in order."""
        return nn.ModuleList([self.conv1, self.bn1, self.layer1, self.layer2, self.layer3])

    def get_bn_before_relu(self) -> list[nn.Module]:
        """The last BatchNorm of each stage: as in a ResNet, the shortcut is added after it and the ReLU follows."""
        return [stage[-1].bn3 for stage in (self.layer1, self.layer2, self.layer3)]  # type: ignore[misc]

    def get_stage_channels(self) -> list[int]:
        """Channels of each feature."""
        return self.stage_channels

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """(B, 3, H, W) -> logits (B, C), and the features."""
        stem = F.relu(self.bn1(self.conv1(x)))
        feat1, preact1 = _run(self.layer1, stem)
        feat2, preact2 = _run(self.layer2, feat1)
        feat3, preact3 = _run(self.layer3, feat2)
        pooled = global_pool(feat3)
        return self.linear(pooled), {
            "feats": [stem, feat1, feat2, feat3],
            "preact_feats": [stem, preact1, preact2, preact3],
            "last_map": feat3,
            "pooled_feat": pooled,
        }


def ShuffleV1(num_classes: int = 100) -> ShuffleNet:
    """ShuffleNet with three groups."""
    return ShuffleNet(num_classes)
