"""MobileNetV1 for ImageNet's 224x224 images."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ...errors import UserError
from .._network import Network
from .._staged import global_pool

# Channels and stride of the 13 depthwise separable convolutions: table 1 of the paper.
SETTINGS = [
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (1024, 2),
    (1024, 1),
]
# Indices in `model` of the last layer at each resolution from 1/4 on.
STAGE_ENDS = (3, 5, 11, 13)


def _conv_bn(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out_channels)]


def _separable(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """3x3 convolution of each channel, then a 1x1 convolution across them; without the last ReLU."""
    return nn.Sequential(
        *_conv_bn(in_channels, in_channels, 3, stride, groups=in_channels),
        nn.ReLU(inplace=True),
        *_conv_bn(in_channels, out_channels, 1),
    )


class MobileNetV1(Network):
    """MobileNetV1 of width 1, with four features: the last at 1/4, 1/8, 1/16 and 1/32 of the image's size.

    Args:
        pretrained: refused, because torchvision publishes no weights of this network.
        num_classes: C.

    Raises:
        UserError: `pretrained` is true.

    Reference: Howard et al. 2017, arXiv 1704.04861.
    """

    # `feats` begins with the first stage, as in the original; distillers that pair stages ask.
    stem_in_feats = False

    def __init__(self, pretrained: bool = False, num_classes: int = 1000) -> None:
        if pretrained:
            raise UserError(
                "MobileNetV1 has no published torchvision weights; build it with pretrained=False and load a checkpoint"
            )
        super().__init__()
        channels = 32
        # Every layer ends in its BatchNorm; `forward` applies the ReLU, so that it can also return the value before it.
        self.model = nn.ModuleList([nn.Sequential(*_conv_bn(3, channels, 3, stride=2))])
        for out_channels, stride in SETTINGS:
            self.model.append(_separable(channels, out_channels, stride))
            channels = out_channels
        self.fc = nn.Linear(channels, num_classes)

    def get_feat_modules(self) -> nn.ModuleList:
        """The modules up to the last feature, in order."""
        return self.model

    def get_bn_before_relu(self) -> list[nn.Module]:
        """The BatchNorm whose output the ReLU turns into the feature, for each feature."""
        return [self.model[i][-1] for i in STAGE_ENDS]  # type: ignore[index]

    def get_stage_channels(self) -> list[int]:
        """Channels of each feature."""
        return [128, 256, 512, 1024]

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """(B, 3, H, W) -> logits (B, C), and the features."""
        feats, preacts = [], []
        for i, layer in enumerate(self.model):
            preact = layer(x)
            x = F.relu(preact)
            if i in STAGE_ENDS:
                feats.append(x)
                preacts.append(preact)
        pooled = global_pool(x)
        return self.fc(pooled), {"feats": feats, "preact_feats": preacts, "last_map": x, "pooled_feat": pooled}
