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

from ...console import note
from ...errors import UserError
from .._four_stages import FourStageResNet
from .._residual import BasicBlock, Bottleneck, Residual, conv


class ResNet(FourStageResNet):
    """`FourStageResNet` whose stages begin at 1/4 of the image's size.

    Five features: the stem's, at 1/2 of the image's size before max pooling, and the four stages'.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        counts: blocks in each of the four stages.
        num_classes: width of the logits.
        zero_init_residual: every block starts as its skip alone (the scale of its last BatchNorm is 0).
    """

    def __init__(
        self,
        block: type[Residual],
        counts: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__(block, counts, num_classes, stem=conv(3, 64, 7, stride=2), skip_name="downsample")
        if zero_init_residual:
            for m in self.modules():
                if isinstance(m, Residual):
                    nn.init.zeros_(m.last_bn.weight)

    def enter_stages(self, stem: Tensor) -> Tensor:
        """The stem's map at half its height and width."""
        return F.max_pool2d(stem, 3, stride=2, padding=1)

    def get_bn_before_relu(self) -> list[nn.Module]:
        """The last BatchNorm of stages 2, 3 and 4: the three that OFD distils on ImageNet."""
        return super().get_bn_before_relu()[1:]


def load_published(net: nn.Module, name: str) -> None:
    """Load torchvision's published weights (IMAGENET1K_V1) of the model that it calls `name`.

    They are read from torch hub's cache, into which they are downloaded if missing.

    Raises:
        UserError: the weights are not in the cache and cannot be fetched, or the cached file is damaged.
    """
    from torchvision.models import get_model_weights

    url = get_model_weights(name)["IMAGENET1K_V1"].url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    try:
        # Not torch.hub.load_state_dict_from_url: it unpacks a zip of one file into the cache.
        if not path.exists():
            note(f"downloading {url} to {path}")
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rsplit("-", 1)[-1])
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # A damaged file raises errors of many types, for example of zip or pickle.
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
        raise UserError(f"{name}'s published weights are for 1000 classes, not {num_classes}; use pretrained=False")
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
