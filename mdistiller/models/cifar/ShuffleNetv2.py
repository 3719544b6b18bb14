"""ShuffleNetV2 of width 1 for 32x32 and 64x64 images: `ShuffleV2`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import channel_shuffle

from .._network import Network
from .._staged import global_pool

STEM_CHANNELS = 24


class ChannelNorm(NamedTuple):
    """Scale and shift of each channel of a map whose channels come from several BatchNorms.

    Used in place of a single BatchNorm: the channel's pre-activation has mean `bias` and standard deviation |`weight`|.
    """

    weight: Tensor
    """(C,)"""
    bias: Tensor
    """(C,)"""


def _join(parts: Sequence[Any]) -> ChannelNorm:
    """The norm of maps concatenated along their channels."""
    return ChannelNorm(
        torch.cat([p.weight.detach() for p in parts]),
        torch.cat([p.bias.detach() for p in parts]),
    )


def _conv_bn(channels: int, out_channels: int, kernel: int, stride: int = 1) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """A 1x1 convolution, or a depthwise 3x3 one, and its BatchNorm."""
    groups = 1 if kernel == 1 else channels
    conv = nn.Conv2d(channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(out_channels)


class BasicBlock(nn.Module):
    """Half of the channels pass, the other half go through 1x1, 3x3 and 1x1 convolutions; then all are shuffled.

    Reference: Ma et al. 2018, arXiv 1807.11164, figure 3 (c).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1, self.bn1 = _conv_bn(half, half, 1)
        self.conv2, self.bn2 = _conv_bn(half, half, 3)
        self.conv3, self.bn3 = _conv_bn(half, half, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> two maps of this shape: after the ReLU and shuffled; before the ReLU and not shuffled."""
        passed, out = x.chunk(2, dim=1)
        out = F.relu(self.bn1(self.conv1(out)))
        out = self.bn3(self.conv3(self.bn2(self.conv2(out))))
        preact = torch.cat([passed, out], dim=1)
        # The half that passed is >= 0 already, so this ReLU changes only the other half.
        return channel_shuffle(F.relu(preact), 2), preact

    def norm(self, x: ChannelNorm) -> ChannelNorm:
        """The norm of `preact`, given the norm of the input's pre-activation."""
        passed = ChannelNorm(x.weight.chunk(2)[0], x.bias.chunk(2)[0])
        return _join([passed, self.bn3])


class DownBlock(nn.Module):
    """Both branches take all channels and halve the map; their outputs are concatenated and shuffled.

    Reference: Ma et al. 2018, arXiv 1807.11164, figure 3 (d).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.conv1, self.bn1 = _conv_bn(in_channels, in_channels, 3, stride=2)
        self.conv2, self.bn2 = _conv_bn(in_channels, half, 1)
        self.conv3, self.bn3 = _conv_bn(in_channels, half, 1)
        self.conv4, self.bn4 = _conv_bn(half, half, 3, stride=2)
        self.conv5, self.bn5 = _conv_bn(half, half, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C_in, H, W) -> two maps (B, C_out, H / 2, W / 2): as those of `BasicBlock`."""
        left = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        right = F.relu(self.bn3(self.conv3(x)))
        right = self.bn5(self.conv5(self.bn4(self.conv4(right))))
        preact = torch.cat([left, right], dim=1)
        return channel_shuffle(F.relu(preact), 2), preact

    def norm(self) -> ChannelNorm:
        """The norm of `preact`."""
        return _join([self.bn2, self.bn5])


def _shuffle_norm(norm: ChannelNorm) -> ChannelNorm:
    weight, bias = (channel_shuffle(v.view(1, -1, 1, 1), 2).flatten() for v in norm)
    return ChannelNorm(weight, bias)


class Stage(nn.Sequential):
    """A DownBlock and `repeats` BasicBlocks."""

    def __init__(self, in_channels: int, out_channels: int, repeats: int) -> None:
        super().__init__(DownBlock(in_channels, out_channels), *(BasicBlock(out_channels) for _ in range(repeats)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The two maps of the last block; see `BasicBlock.forward`."""
        preact = x
        for block in self:
            x, preact = block(x)
        return x, preact

    def norm(self) -> ChannelNorm:
        """The norm of the stage's pre-activation: each channel traced back through the shuffles to its BatchNorm."""
        blocks: list[Any] = list(self)
        norm = blocks[0].norm()
        for block in blocks[1:]:
            norm = block.norm(_shuffle_norm(norm))
        return norm


class ShuffleNetV2(Network):
    """ShuffleNetV2 for 32x32 images (or larger), with four features: the stem and the three stages.

    A stage's pre-activation holds the half that passed (made by earlier blocks, after their ReLU) and the half that
    the last block made, in this order, not shuffled (the pinned sums and norms hold for either order).
    The stem's pre-activation is its feature, after the ReLU, as in the pinned values.

    Args:
        num_classes: C.
        channels: of the three stages and of the last convolution.
        repeats: blocks that follow the first one of each stage.

    Reference: Ma et al. 2018, arXiv 1807.11164, table 5 (1x).
    """

    classifier_name = "linear"

    def __init__(
        self,
        num_classes: int = 100,
        channels: tuple[int, int, int, int] = (116, 232, 464, 1024),
        repeats: tuple[int, int, int] = (3, 7, 3),
    ) -> None:
        super().__init__()
        self.stage_channels = [STEM_CHANNELS, *channels[:3]]
        self.conv1, self.bn1 = _conv_bn(3, STEM_CHANNELS, 1)
        self.layer1 = Stage(STEM_CHANNELS, channels[0], repeats[0])
        self.layer2 = Stage(channels[0], channels[1], repeats[1])
        self.layer3 = Stage(channels[1], channels[2], repeats[2])
        self.conv2, self.bn2 = _conv_bn(channels[2], channels[3], 1)
        self.linear = nn.Linear(channels[3], num_classes)

    def get_feat_modules(self) -> nn.ModuleList:
        """The modules up to the last feature, in order."""
        return nn.ModuleList([self.conv1, self.bn1, self.layer1, self.layer2, self.layer3])

    def get_bn_before_relu(self) -> list[ChannelNorm]:
        """For each stage the current scale and shift of every channel of its pre-activation.

        No single BatchNorm makes a stage's map, so the channels are traced back to the BatchNorms that made them;
        OFD reads `weight` and `bias` of it as of a BatchNorm. For the half that passed OFD's margin has no effect:
        those channels are never negative.
        """
        return [self.layer1.norm(), self.layer2.norm(), self.layer3.norm()]

    def get_stage_channels(self) -> list[int]:
        """Channels of each feature."""
        return self.stage_channels

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """(B, 3, H, W) -> logits (B, C), and the features."""
        stem = F.relu(self.bn1(self.conv1(x)))
        feat1, preact1 = self.layer1(stem)
        feat2, preact2 = self.layer2(feat1)
        feat3, preact3 = self.layer3(feat2)
        out = F.relu(self.bn2(self.conv2(feat3)))
        pooled = global_pool(out)
        return self.linear(pooled), {
            "feats": [stem, feat1, feat2, feat3],
            "preact_feats": [stem, preact1, preact2, preact3],
            "last_map": out,
            "pooled_feat": pooled,
        }


def ShuffleV2(num_classes: int = 100) -> ShuffleNetV2:
    """ShuffleNetV2 of width 1."""
    return ShuffleNetV2(num_classes)
