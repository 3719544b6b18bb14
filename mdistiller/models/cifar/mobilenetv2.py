"""MobileNetV2 of half width for 32x32 images: `mobile_half`. The bottleneck also serves Tiny-ImageNet's network."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .._network import Network
from .._staged import global_pool, init_weights

# One row per group of blocks: expansion, channels at width 1, repeats, first stride. Table 2 of the paper, with the
# second group at stride 1 because CIFAR's images are small.
GROUPS = [
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
]
# The groups whose output is a feature map: the last at each resolution.
STAGE_ENDS = (1, 2, 4, 6)


class InvertedResidual(nn.Module):
    """Expand (1x1), filter each channel (3x3), project (1x1); no activation after the projection or the sum.

    Args:
        expansion: hidden channels per input channel.
        bias: whether the convolutions have one; public checkpoints of the two data sets differ.
        act: activation after the first and the second convolution.

    Reference: Sandler et al. 2018, arXiv 1801.04381, section 3.3.
    """

    # What state dicts call the three convolutions.
    body_name = "conv"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        expansion: int,
        bias: bool = False,
        act: type[nn.ReLU] | type[nn.ReLU6] = nn.ReLU,
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        body = nn.Sequential(
            nn.Conv2d(in_channels, hidden, 1, bias=bias),
            nn.BatchNorm2d(hidden),
            act(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=bias),
            nn.BatchNorm2d(hidden),
            act(inplace=True),
            nn.Conv2d(hidden, out_channels, 1, bias=bias),
            nn.BatchNorm2d(out_channels),
        )
        self.add_module(self.body_name, body)
        self.has_skip = stride == 1 and in_channels == out_channels

    @property
    def body(self) -> nn.Sequential:
        """The three convolutions with their BatchNorms."""
        return getattr(self, self.body_name)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H / stride, W / stride)."""
        out = self.body(x)
        return x + out if self.has_skip else out


def last_bn(blocks: nn.Sequential) -> nn.Module:
    """The BatchNorm of the last block's projection: the last layer before the stage's feature."""
    block = blocks[-1]
    assert isinstance(block, InvertedResidual)
    return block.body[-1]


def _conv_bn(in_channels: int, out_channels: int, kernel: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class MobileNetV2(Network):
    """MobileNetV2 for 32x32 images (or larger), with five features: the stem and the four resolutions.

    The stem's pre-activation is its BatchNorm's output. The other four features end in a linear projection, which
    no activation follows, so there the pre-activation is the feature itself. It is what OFD needs from a teacher (the
    last value that still has negative entries; the margin comes from the projection's BatchNorm) and what ReviewKD
    fuses (the map before an activation discards information), and it has the feature's shape as in every other network.

    Args:
        num_classes: C.
        width: factor on all channels but the last 1280.

    Reference: Sandler et al. 2018, arXiv 1801.04381.
    """

    classifier_name = "classifier"

    def __init__(self, num_classes: int = 100, width: float = 1.0) -> None:
        super().__init__()
        channels = int(32 * width)
        self.stage_channels = [channels]
        self.conv1 = _conv_bn(3, channels, kernel=3, stride=2)
        self.blocks = nn.ModuleList()
        for expansion, base_channels, repeats, first_stride in GROUPS:
            group = nn.Sequential()
            for i in range(repeats):
                out_channels = int(base_channels * width)
                group.append(InvertedResidual(channels, out_channels, first_stride if i == 0 else 1, expansion))
                channels = out_channels
            self.blocks.append(group)
            if len(self.blocks) - 1 in STAGE_ENDS:
                self.stage_channels.append(channels)
        self.conv2 = _conv_bn(channels, 1280, kernel=1, stride=1)
        linear = nn.Linear(1280, num_classes)
        self.classifier = nn.Sequential(linear)
        self.apply(init_weights)
        nn.init.normal_(linear.weight, 0, 0.01)
        nn.init.zeros_(linear.bias)

    def get_feat_modules(self) -> nn.ModuleList:
        """The modules up to the last feature, in order."""
        return nn.ModuleList([self.conv1, *self.blocks])

    def get_bn_before_relu(self) -> list[nn.Module]:
        """The last BatchNorm of each feature but the stem's."""
        return [last_bn(self.blocks[i]) for i in STAGE_ENDS]  # type: ignore[arg-type]

    def get_stage_channels(self) -> list[int]:
        """Channels of each feature."""
        return self.stage_channels

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """(B, 3, H, W) -> logits (B, C), and the features."""
        stem = self.conv1(x)
        out = F.relu(stem)
        feats, preacts = [out], [stem]
        for i, group in enumerate(self.blocks):
            out = group(out)
            if i in STAGE_ENDS:
                feats.append(out)
                preacts.append(out)
        out = F.relu(self.conv2(out))
        pooled = global_pool(out)
        return self.classifier(pooled), {
            "feats": feats,
            "preact_feats": preacts,
            "last_map": out,
            "pooled_feat": pooled,
        }


def mobile_half(num_classes: int = 100) -> MobileNetV2:
    """CIFAR's MobileNetV2: width 0.5."""
    return MobileNetV2(num_classes, width=0.5)
