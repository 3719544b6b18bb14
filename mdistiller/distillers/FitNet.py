"""FitNets: a hint layer of the teacher guides a layer of the student."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode as CN

from ..models.cost import count_parameters
from ..models.parameters import Group
from ..ranges import NOT_NEGATIVE, WHOLE, list_of, whole
from ._base import FeatureDistiller, Features, Losses, register
from ._feature_maps import hint_layers, input_size, probe_pair, regressor, require_maps
from .stages import Stage, parameters_behind

DEFAULTS = CN(
    {
        "HINT_LAYER": 2,
        "INPUT_SIZE": [32, 32],
        "INIT_EPOCHS": 0,
        "LOSS": CN({"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 100.0}),
    }
)


RANGES = {
    "HINT_LAYER": WHOLE,  # a negative one counts from the deepest map
    "INPUT_SIZE": list_of(whole(1), 0, 2),
    "INIT_EPOCHS": whole(0),
    "LOSS.CE_WEIGHT": NOT_NEGATIVE,
    "LOSS.FEAT_WEIGHT": NOT_NEGATIVE,
}


@register("FITNET", DEFAULTS, ranges=RANGES)
class FitNet(FeatureDistiller):
    """Cross-entropy with the labels and the squared error between hint and guided layer.

        loss_kd = FEAT_WEIGHT * mean[ (regressor(feats_s[HINT_LAYER]) - feats_t[HINT_LAYER])^2 ]

    HINT_LAYER counts in both networks' lists, from the stem's map, or from the deepest one if it is negative. A pair in
    DISTILLER.PAIRS, [[guided layer, hint layer]], replaces it. The regressor takes maps of any sizes, see `regressor`.

    INIT_EPOCHS is the paper's first stage: so many epochs before training, in which `loss_kd` alone trains the student
    up to the guided layer, and the regressor. The default, 0, skips this stage, like the original.

    Args:
        image_size: of the run; without it FITNET.INPUT_SIZE counts, [] for the data set's.

    Raises:
        UserError: HINT_LAYER is not the index of a feature map in both networks, DISTILLER.PAIRS names several pairs,
            the two are not maps, or INPUT_SIZE contradicts the run.

    Reference: Romero et al. 2015, arXiv 1412.6550, section 2.2.
    """

    needs_run = ("image_size",)
    teacher_outputs = ("feats",)
    compares_maps = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN, image_size: int | None = None) -> None:
        super().__init__(student, teacher, cfg.FITNET)
        self.init_epochs = cfg.FITNET.INIT_EPOCHS
        self.size = input_size(cfg.FITNET.INPUT_SIZE, image_size, cfg, "FITNET.INPUT_SIZE")
        maps_s, maps_t = (features["feats"] for features in probe_pair(student, teacher, self.size))
        self.guided, self.hint = hint_layers(cfg, "FITNET", (len(maps_s), len(maps_t)), (student, teacher))
        self.reads_only("teacher", [f"feats[{self.hint}]"])
        hint = maps_s[self.guided].shape, maps_t[self.hint].shape
        require_maps([hint], "FITNET", (student, teacher))
        self.conv_reg = regressor(*hint)

    def get_learnable_parameters(self) -> list[nn.Parameter | Group]:
        return super().get_learnable_parameters() + list(self.conv_reg.parameters())

    def get_extra_parameters(self) -> int:
        return count_parameters(self.conv_reg)

    def feature_loss(self, feature_student: Features, feature_teacher: Features) -> Tensor:
        guided = self.conv_reg(feature_student["feats"][self.guided])
        return F.mse_loss(guided, feature_teacher["feats"][self.hint])

    def stages(self) -> tuple[Stage, ...]:
        if not self.init_epochs:
            return ()
        trunk = parameters_behind(self.student, self.size, lambda features: [features["feats"][self.guided]])
        return (Stage("hint", self.init_epochs, [*trunk, *self.conv_reg.parameters()], self.hint_alone),)

    def hint_alone(self, image: Tensor, target: Tensor, **kwargs: Any) -> Losses:
        """The stage's loss."""
        features = self.student(image)[1], self.teacher_forward(image)[1]
        return {"loss_kd": self.feat_loss_weight * self.feature_loss(*features)}
