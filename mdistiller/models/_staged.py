"""A network in three parts, trunk -> last stage -> classifier, so that DCGD can grow branches on the trunk.

    feats, preacts = net.forward_trunk(image)                                  # stem and every stage but the last
    last_feats, last_preacts, pooled = net.forward_last(net, feats[-1])        # the network's own last stage
    logits = net.get_classifier()(pooled)

A branch is another last stage on the same trunk, with its own classifier:

    branch = net.new_last_stage()                                              # state: layer3.* (or block3.*, bn1.*)
    _, _, pooled = net.forward_last(branch, feats[-1])

`forward_last` reads its layers from its first argument, so the network and its branches share one forward. It pools
the map of `forward_last_map`, which a family defines.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ._network import Network
from .copies import copy_without_hooks

Maps = list[Tensor]


def init_weights(module: nn.Module) -> None:
    """Draw a convolution's weights from N(0, 2 / (k * k * out_channels)); BatchNorm and biases start as the identity.

    BatchNorm's statistics start anew. Linear layers keep PyTorch's own initialisation. Use: `net.apply(init_weights)`.

    Reference: He et al. 2015, arXiv 1502.01852, section 2.2.
    """
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        module.reset_parameters()


def global_pool(x: Tensor) -> Tensor:
    """Mean over height and width: (B, C, H, W) -> (B, C)."""
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


class StagedNet(Network):
    """An image classifier whose last stage can be split off; see the module's docstring.

    A family defines `forward_trunk`, `forward_last_map`, `last_stage`, its `classifier_name`, and what distillers call
    on every network: `get_feat_modules`, `get_bn_before_relu`, `get_stage_channels`.
    """

    # The submodules that `forward_last_map` reads.
    last_stage: ClassVar[tuple[str, ...]]
    # Initialises the weights of one module; for `apply`.
    init_weights = staticmethod(init_weights)

    def forward_trunk(self, image: Tensor) -> tuple[Maps, Maps]:
        """Feature maps after and before the activation, of the stem and of every stage but the last.

        In WRN the next stage's BatchNorm computes the map before the activation; `forward_last_map` returns the last.
        """
        raise NotImplementedError

    @classmethod
    def forward_last(cls, stage: Any, x: Tensor) -> tuple[Maps, Maps, Tensor]:
        """The last stage's maps after and before the activation, and the pooled feature (B, D).

        Args:
            stage, x: see `forward_last_map`.
        """
        feats, preacts, last_map = cls.forward_last_map(stage, x)
        return feats, preacts, global_pool(last_map)

    @staticmethod
    def forward_last_map(stage: Any, x: Tensor) -> tuple[Maps, Maps, Tensor]:
        """The last stage's maps after and before the activation, and the map (B, D, H, W) that is pooled.

        Args:
            stage: the network, or a branch made by `new_last_stage`.
            x: (B, C, H, W), the last of the trunk's `feats`.
        """
        raise NotImplementedError

    def new_last_stage(self) -> nn.Module:
        """A last stage with the same layers and names, and freshly initialised weights."""
        branch = nn.Module()
        for name in self.last_stage:
            branch.add_module(name, copy_without_hooks(getattr(self, name)))
        return branch.apply(self.init_weights)

    def forward(self, image: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """(B, 3, H, W) -> logits (B, C) and the features.

        {"feats", "preact_feats": maps by stage, "last_map": (B, D, H, W), "pooled_feat": (B, D), the last map's mean}
        """
        feats, preacts = self.forward_trunk(image)
        last_feats, last_preacts, last_map = self.forward_last_map(self, feats[-1])
        pooled = global_pool(last_map)
        return self.get_classifier()(pooled), {
            "feats": feats + last_feats,
            "preact_feats": preacts + last_preacts,
            "last_map": last_map,
            "pooled_feat": pooled,
        }

    def get_feat_modules(self) -> nn.ModuleList:
        """The modules from the image to the last feature map, in order."""
        raise NotImplementedError

    def get_bn_before_relu(self) -> list[nn.Module]:
        """The BatchNorm that ends each stage, from which OFD computes its margins."""
        raise NotImplementedError

    def get_stage_channels(self) -> list[int]:
        """Channels of the feature maps, by stage."""
        raise NotImplementedError
