"""FitNets: a hint layer of the teacher guides a layer of the student."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode as CN

from ..models.cost import count_parameters
from ._base import FeatureDistiller, Features, Losses, register
from ._feature_maps import ConvReg, get_feat_shapes, require_maps

DEFAULTS = CN(
    {
        "HINT_LAYER": 2,
        "INPUT_SIZE": [32, 32],
        "INIT_EPOCHS": 0,
        "LOSS": CN({"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 100.0}),
    }
)


@register("FITNET", DEFAULTS)
class FitNet(FeatureDistiller):
    """Cross-entropy with the labels and the squared error between hint and guided layer.

        loss_kd = FEAT_WEIGHT * mean[ (regressor(feats_s[HINT_LAYER]) - feats_t[HINT_LAYER])^2 ]

    During the first INIT_EPOCHS epochs the cross-entropy has weight 0: the paper's first stage, in which the hint
    alone trains the student up to the guided layer. `loss_ce` is then 0, and the layers above the guided one get zero
    gradients, but the optimizer's weight decay still changes them. The default, 0, skips this stage, like the original.

    Raises:
        ValueError: HINT_LAYER is not the index of a feature map in both networks, or no regressor fits their shapes.

    Reference: Romero et al. 2015, arXiv 1412.6550, section 2.2.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN) -> None:
        super().__init__(student, teacher, cfg.FITNET)
        self.hint_layer = cfg.FITNET.HINT_LAYER
        self.init_epochs = cfg.FITNET.INIT_EPOCHS
        shapes_s, shapes_t = get_feat_shapes(student, teacher, cfg.FITNET.INPUT_SIZE)
        count = min(len(shapes_s), len(shapes_t))
        if not -count <= self.hint_layer < count:
            raise ValueError(f"FITNET.HINT_LAYER is {self.hint_layer}, the networks have feature maps 0 to {count - 1}")
        hint = shapes_s[self.hint_layer], shapes_t[self.hint_layer]
        require_maps([hint], "FITNET")
        self.conv_reg = ConvReg(*hint)

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        return super().get_learnable_parameters() + list(self.conv_reg.parameters())

    def get_extra_parameters(self) -> int:
        return count_parameters(self.conv_reg)

    def feature_loss(self, feature_student: Features, feature_teacher: Features) -> Tensor:
        guided = self.conv_reg(feature_student["feats"][self.hint_layer])
        return F.mse_loss(guided, feature_teacher["feats"][self.hint_layer])

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, Losses]:
        logits_student, losses = super().forward_train(image, target, **kwargs)
        if kwargs.get("epoch", 1) <= self.init_epochs:
            losses["loss_ce"] = 0 * losses["loss_ce"]
        return logits_student, losses
