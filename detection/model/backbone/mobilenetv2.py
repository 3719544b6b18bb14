"""MobileNetV2 as a detectron2 backbone: feature maps m2..m5 at strides 4, 8, 16 and 32."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn as nn
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec, get_norm
from detectron2.modeling import Backbone
from torch import Tensor

from mdistiller.errors import UserError

# One row per group of blocks: expansion, channels, repeats, stride of the first block. Table 2 of the paper.
GROUPS = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
# The name of the feature map after a group, by the group's index: the last map at each stride.
MAPS = {1: "m2", 2: "m3", 4: "m4", 6: "m5"}


def conv_norm(in_channels: int, out_channels: int, kernel: int, norm: str, stride: int = 1, groups: int = 1) -> list:
    """A convolution without bias and its normalisation, which has one."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out")
    return [conv, get_norm(norm, out_channels)]


class InvertedResidual(nn.Module):
    """Expand (1x1; not at expansion 1), convolve each channel (3x3), project (1x1, no activation after it).

    Reference: Sandler et al. 2018, arXiv 1801.04381, section 3.3.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int, norm: str) -> None:
        super().__init__()
        hidden = in_channels * expansion
        expand = [*conv_norm(in_channels, hidden, 1, norm), nn.ReLU6(inplace=True)] if expansion > 1 else []
        filters = [*conv_norm(hidden, hidden, 3, norm, stride, groups=hidden), nn.ReLU6(inplace=True)]
        self.conv = nn.Sequential(*expand, *filters, *conv_norm(hidden, out_channels, 1, norm))
        self.has_skip = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H / stride, W / stride)."""
        return x + self.conv(x) if self.has_skip else self.conv(x)


class MobileNetV2(Backbone):
    """MobileNetV2 of width 1 without its last 1x1 convolution and classifier.

    Args:
        in_channels: of the image.
        out_features: which of m2 (24 channels), m3 (32), m4 (96) and m5 (320) to return.
        norm: detectron2's name of a normalisation; FrozenBN in every published config.
        freeze_at: 0 trains everything; 1 freezes the stem, 2 also the blocks up to m2, ... 5 everything.

    Raises:
        UserError: an unknown feature.

    Reference: Sandler et al. 2018, arXiv 1801.04381.
    """

    def __init__(
        self, in_channels: int = 3, out_features: Sequence[str] = ("m2",), norm: str = "FrozenBN", freeze_at: int = 0
    ) -> None:
        super().__init__()
        unknown = sorted(set(out_features) - set(MAPS.values()))
        if unknown:
            raise UserError(f"MODEL.MOBILENETV2.OUT_FEATURES accepts {', '.join(MAPS.values())}, not {unknown[0]!r}")
        self._out_features = list(out_features)
        channels, stride = 32, 2
        self.features = nn.Sequential()
        self.features.append(nn.Sequential(*conv_norm(in_channels, channels, 3, norm, stride), nn.ReLU6(inplace=True)))
        # The index in `features` of each map's last block, and each map's channels and stride.
        self.ends: dict[int, str] = {}
        self.shapes: dict[str, ShapeSpec] = {}
        for group, (expansion, out_channels, repeats, first_stride) in enumerate(GROUPS):
            for i in range(repeats):
                block_stride = first_stride if i == 0 else 1
                self.features.append(InvertedResidual(channels, out_channels, block_stride, expansion, norm))
                channels, stride = out_channels, stride * block_stride
            if group in MAPS:
                self.ends[len(self.features) - 1] = MAPS[group]
                self.shapes[MAPS[group]] = ShapeSpec(channels=channels, stride=stride)
        self._freeze(freeze_at)

    def _freeze(self, freeze_at: int) -> None:
        last_of_stage = [0, *self.ends]  # the stem, then each map's last block
        frozen = last_of_stage[min(freeze_at, len(last_of_stage)) - 1] + 1 if freeze_at > 0 else 0
        for i in range(frozen):
            self.features[i].requires_grad_(False)
            self.features[i] = FrozenBatchNorm2d.convert_frozen_batchnorm(self.features[i])

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each feature that is returned."""
        return {name: self.shapes[name] for name in self._out_features}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, C, H, W) -> the features by name, each (B, C_name, H / stride, W / stride)."""
        outputs = {}
        for i, block in enumerate(self.features):
            x = block(x)
            if self.ends.get(i) in self._out_features:
                outputs[self.ends[i]] = x
        return outputs
