"""The ResNet of four stages (64, 128, 256 and 512 channels times the expansion), for ImageNet and for small images.

Reference: He et al. 2016, arXiv 1512.03385.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ._residual import Residual, Stage
from ._staged import Maps, StagedNet


class FourStageResNet(StagedNet):
    """Stem, four stages, linear classifier.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        counts: blocks in each of the four stages.
        num_classes: width of the logits.
        stem: the first convolution, from 3 to 64 channels.
        skip_name: what a block calls its projection.
    """

    last_stage = ("layer4",)

    def __init__(
        self, block: type[Residual], counts: Sequence[int], num_classes: int, stem: nn.Conv2d, skip_name: str
    ) -> None:
        super().__init__()
        self.stage_channels = [width * block.expansion for width in (64, 128, 256, 512)]
        c1, c2, c3, c4 = self.stage_channels
        self.conv1 = stem
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = Stage(block, counts[0], 64, 64, skip_name=skip_name)
        self.layer2 = Stage(block, counts[1], c1, 128, stride=2, skip_name=skip_name)
        self.layer3 = Stage(block, counts[2], c2, 256, stride=2, skip_name=skip_name)
        self.layer4 = Stage(block, counts[3], c3, 512, stride=2, skip_name=skip_name)
        self.add_module(self.classifier_name, nn.Linear(c4, num_classes))
        self.apply(self.init_weights)

    def enter_stages(self, stem: Tensor) -> Tensor:
        """The first stage's input, from the stem's map."""
        return stem

    def forward_trunk(self, image: Tensor) -> tuple[Maps, Maps]:
        f0 = F.relu(self.bn1(self.conv1(image)))
        f1, f1_pre = self.layer1(self.enter_stages(f0))
        f2, f2_pre = self.layer2(f1)
        f3, f3_pre = self.layer3(f2)
        return [f0, f1, f2, f3], [f0, f1_pre, f2_pre, f3_pre]

    @staticmethod
    def forward_last_map(stage: Any, x: Tensor) -> tuple[Maps, Maps, Tensor]:
        f4, f4_pre = stage.layer4(x)
        return [f4], [f4_pre], f4

    def get_feat_modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.conv1, self.bn1, self.layer1, self.layer2, self.layer3, self.layer4])

    def get_bn_before_relu(self) -> list[nn.Module]:
        return [stage.last_bn for stage in (self.layer1, self.layer2, self.layer3, self.layer4)]

    def get_stage_channels(self) -> list[int]:
        """Channels of the four stages; the stem is left out."""
        return self.stage_channels
