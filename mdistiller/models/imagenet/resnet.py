"""ImageNet's ResNets, with the names and shapes of torchvision's weights, which `pretrained=True` loads.

Reference: He et al. 2016, arXiv 1512.03385, table 1; stride in the 3x3 convolution of a bottleneck, as torchvision's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ...errors import UserError
from .._residual import BasicBlock, Bottleneck, Residual, Stage, conv
from .._staged import Maps, StagedNet, global_pool


class ResNet(StagedNet):
    """Stem at 1/4 of the image's size, four stages of 64, 128, 256 and 512 times the block's expansion, classifier.

    Five features: the stem's, at 1/2 of the image's size before max pooling, and the four stages'.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        counts: blocks in each of the four stages.
        num_classes: width of the logits.
        zero_init_residual: every block starts as its skip alone (the scale of its last BatchNorm is 0).
    """

    last_stage = ("layer4",)

    def __init__(
        self,
        block: type[Residual],
        counts: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        self.stage_channels = [width * block.expansion for width in (64, 128, 256, 512)]
        c1, c2, c3, c4 = self.stage_channels
        self.conv1 = conv(3, 64, 7, stride=2)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = Stage(block, counts[0], 64, 64)
        self.layer2 = Stage(block, counts[1], c1, 128, stride=2)
        self.layer3 = Stage(block, counts[2], c2, 256, stride=2)
        self.layer4 = Stage(block, counts[3], c3, 512, stride=2)
        self.fc = nn.Linear(c4, num_classes)
        self.apply(self.init_weights)
        if zero_init_residual:
            for m in self.modules():
                if isinstance(m, Residual):
                    nn.init.zeros_(m.last_bn.weight)

    def forward_trunk(self, image: Tensor) -> tuple[Maps, Maps]:
        f0 = F.relu(self.bn1(self.conv1(image)))
        f1, f1_pre = self.layer1(F.max_pool2d(f0, 3, stride=2, padding=1))
        f2, f2_pre = self.layer2(f1)
        f3, f3_pre = self.layer3(f2)
        return [f0, f1, f2, f3], [f0, f1_pre, f2_pre, f3_pre]

    @staticmethod
    def forward_last(stage: Any, x: Tensor) -> tuple[Maps, Maps, Tensor]:
        f4, f4_pre = stage.layer4(x)
        return [f4], [f4_pre], global_pool(f4)

    def get_feat_modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.conv1, self.bn1, self.layer1, self.layer2, self.layer3, self.layer4])

    def get_bn_before_relu(self) -> list[nn.Module]:
        """The last BatchNorm of stages 2, 3 and 4: the three that OFD distils on ImageNet."""
        return [stage.last_bn for stage in (self.layer2, self.layer3, self.layer4)]

    def get_stage_channels(self) -> list[int]:
        """Channels of the four stages; the stem is left out."""
        return self.stage_channels


def load_published(net: nn.Module, name: str) -> None:
    """Load torchvision's published weights (IMAGENET1K_V1) of the model that it calls `name`.

    They come from torch hub's cache, or from the network into it.

    Raises:
        UserError: the weights are not in the cache and cannot be fetched, or the cached file is damaged.
    """
    from torchvision.models import get_model_weights

    url = get_model_weights(name)["IMAGENET1K_V1"].url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    try:
        # check_hash looks at what was downloaded, not at what lies in the cache.
        state = torch.hub.load_state_dict_from_url(url, check_hash=True, map_location="cpu", weights_only=True)
    except Exception as error:
        # A damaged file shows itself by errors of many types: of zip, of pickle.
        if path.exists():
            raise UserError(f"{path} cannot be read as weights; delete it, so that it is fetched again") from error
        raise UserError(f"could not fetch {url} ({error}); put the file at {path}") from error
    try:
        net.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{path} does not hold the weights of {name}; delete it to fetch them again") from error


def _resnet(
    name: str, block: type[Residual], counts: Sequence[int], pretrained: bool, num_classes: int, **kwargs: Any
) -> ResNet:
    if pretrained and num_classes != 1000:
        raise UserError(f"{name}'s published weights know 1000 classes, not {num_classes}; use pretrained=False")
    net = ResNet(block, counts, num_classes, **kwargs)
    if pretrained:
        load_published(net, name)
    return net


def resnet18(pretrained: bool = False, num_classes: int = 1000, **kwargs: Any) -> ResNet:
    """ResNet-18, basic blocks; `kwargs` go to `ResNet`."""
    return _resnet("resnet18", BasicBlock, (2, 2, 2, 2), pretrained, num_classes, **kwargs)


def resnet34(pretrained: bool = False, num_classes: int = 1000, **kwargs: Any) -> ResNet:
    """ResNet-34, basic blocks; `kwargs` go to `ResNet`."""
    return _resnet("resnet34", BasicBlock, (3, 4, 6, 3), pretrained, num_classes, **kwargs)


def resnet50(pretrained: bool = False, num_classes: int = 1000, **kwargs: Any) -> ResNet:
    """ResNet-50, bottleneck blocks; `kwargs` go to `ResNet`."""
    return _resnet("resnet50", Bottleneck, (3, 4, 6, 3), pretrained, num_classes, **kwargs)


def resnet101(pretrained: bool = False, num_classes: int = 1000, **kwargs: Any) -> ResNet:
    """ResNet-101, bottleneck blocks; `kwargs` go to `ResNet`."""
    return _resnet("resnet101", Bottleneck, (3, 4, 23, 3), pretrained, num_classes, **kwargs)


def resnet152(pretrained: bool = False, num_classes: int = 1000, **kwargs: Any) -> ResNet:
    """ResNet-152, bottleneck blocks; `kwargs` go to `ResNet`."""
    return _resnet("resnet152", Bottleneck, (3, 8, 36, 3), pretrained, num_classes, **kwargs)
