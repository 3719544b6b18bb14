"""The classifier of a network: the linear layer from its pooled feature, the mean of its last map, to the logits."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..console import network_name
from ..errors import UserError
from ._staged import global_pool


def classifier_of(network: nn.Module) -> nn.Linear:
    """The layer that gives the logits (B, C) of `network` from its pooled feature (B, D), with its bias.

    It is the network's own layer, whose parameters get the gradients, also where the network is behind `OwnInput` or is
    compiled. A 1x1 convolution comes back as a linear layer that reads the convolution's parameters. Of DCGD's grouped
    student it is that of the plain network, whose last map the features hold.

    Raises:
        UserError: the network does not tell its classifier, or it is no linear layer.
    """
    name = network_name(network)
    tell = getattr(network, "get_classifier", None)
    if tell is None:
        raise UserError(
            f"{name} does not tell its classifier; give it a method get_classifier(self) that returns the nn.Linear "
            'from its pooled feature to the logits, such as self.fc, and the map that it pools as features["last_map"]'
        )
    layer: Any = tell()
    if isinstance(layer, nn.Sequential) and len(layer) == 1:
        layer = layer[0]
    if isinstance(layer, nn.Conv2d) and layer.weight[0, 0].numel() == 1 and layer.groups == 1:
        layer = PointwiseLinear(layer)
    if not isinstance(layer, nn.Linear):
        raise UserError(
            f"the classifier of {name} is {type(layer).__name__}, not one linear layer; choose a network that ends in "
            "one, such as a ResNet, or let its get_classifier() return it"
        )
    return layer


def classified(last_map: Tensor, classifier: Any) -> Tensor:
    """The logits (B, C) that a linear layer, or a 1x1 convolution, gives for the mean of a map (B, D, H, W)."""
    return F.linear(global_pool(last_map), classifier.weight.flatten(1), classifier.bias)


class PointwiseLinear(nn.Linear):
    """A 1x1 convolution as a linear layer on (B, D). It has no parameters: it reads the convolution's.

    A copy of it is a plain linear layer with parameters of its own.
    """

    _conv: nn.Conv2d

    def __init__(self, conv: nn.Conv2d) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = conv.in_channels, conv.out_channels
        object.__setattr__(self, "_conv", conv)  # no submodule, so that no state dict has its parameters twice

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(C, D)."""
        return self._conv.weight.flatten(1)

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """(C,)."""
        return self._conv.bias

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Linear:
        own = nn.Linear(self.in_features, self.out_features, self.bias is not None).to(self.weight)
        state = {"weight": self.weight, "bias": self.bias}
        own.load_state_dict({name: value for name, value in state.items() if value is not None})
        return own.requires_grad_(self.weight.requires_grad)
