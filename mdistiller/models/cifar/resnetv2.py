"""ResNet-18 and ResNet-50 for small images: ImageNet's four stages after a 3x3 stem that keeps the image's size.

Serves CIFAR (32x32) and Tiny-ImageNet (64x64).

Reference: He et al. 2016, arXiv 1512.03385.
"""

from __future__ import annotations

from collections.abc import Sequence

from .._four_stages import FourStageResNet
from .._residual import BasicBlock, Bottleneck, Residual, conv


class ResNet(FourStageResNet):
    """`FourStageResNet` whose stem keeps the image's size."""

    classifier_name = "linear"

    def __init__(self, block: type[Residual], counts: Sequence[int], num_classes: int = 100) -> None:
        super().__init__(block, counts, num_classes, stem=conv(3, 64, 3), skip_name="shortcut")


def ResNet18(num_classes: int = 100) -> ResNet:
    """ResNet-18, basic blocks."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes)


def ResNet50(num_classes: int = 100) -> ResNet:
    """ResNet-50, bottleneck blocks."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes)
