"""Softmax regression representation learning: the student's feature is judged by the teacher's classifier."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode as CN

from ..models.cost import count_parameters
from ..models.parameters import Group
from ..ranges import NOT_NEGATIVE, TEMPERATURE, one_of
from ._base import Distiller, Losses, register
from ._feature_maps import probe_pair
from ._last_map import last_map_shape, pooled_classifier
from ._precision import full_precision
from .facts import image_size_of
from .KD import kd_loss

DEFAULTS = CN({
    "ON": "map",
    "TEMPERATURE": 4.0,
    "LOSS": CN({"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 1.0, "SR_WEIGHT": 1.0, "KD_WEIGHT": 0.0}),
})  # fmt: skip
RANGES = {
    "ON": one_of("map", "pooled"),
    "TEMPERATURE": TEMPERATURE,
    **{f"LOSS.{name}_WEIGHT": NOT_NEGATIVE for name in ("CE", "FEAT", "SR", "KD")},
}


@full_precision
def srrl_losses(
    pooled_student: Tensor, pooled_teacher: Tensor, logits_teacher: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The differences of the features, and of what the teacher's classifier makes of them.

        fm = mean_{B D}[ (g_s - g_t)^2 ],   sr = mean_{B C}[ (W_t g_s + b_t - z_t)^2 ]

    Args:
        pooled_student: g_s (B, D), the mean over the positions of the connector's map.
        pooled_teacher: g_t (B, D); not detached here.
        logits_teacher: z_t (B, C); not detached here.
        weight, bias: W_t (C, D) and b_t (C,), of the teacher's classifier.

    Returns:
        fm and sr, (), >= 0; sr in squared logits. The student's dtype; float32 for half precision.

    Cost: O(B C D), and the connector's O(B D_s D H W).

    Reference: Yang et al. 2021, ICLR.
    """
    again = F.linear(pooled_student, weight, bias)
    return (pooled_student - pooled_teacher).square().mean(), (again - logits_teacher).square().mean()


@register("SRRL", DEFAULTS, ranges=RANGES)
class SRRL(Distiller):
    """Cross-entropy with the labels and both `srrl_losses` of the student's feature behind a connector.

    The connector is a 1x1 convolution to the teacher's width, BatchNorm and ReLU. SRRL.ON "map" has it on the student's
    last map, as the authors' own code does; "pooled" on the pooled feature, which with KD_WEIGHT 1 is the form of the
    toolbox that gave later tables' CIFAR figures. Maps of different sizes need no alignment: only means are compared.
    """

    needs_run = ("image_size",)
    teacher_outputs = ("logits", "pooled_feat")  # the mean of the teacher's last map
    soft_labels = True
    label_weight = "LOSS.CE_WEIGHT"

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN, image_size: int | None = None) -> None:
        super().__init__(student, teacher)
        own = cfg.SRRL
        self.on_map = own.ON == "map"
        self.temperature = own.TEMPERATURE
        self.ce_loss_weight = own.LOSS.CE_WEIGHT
        self.feat_loss_weight = own.LOSS.FEAT_WEIGHT
        self.sr_loss_weight = own.LOSS.SR_WEIGHT
        self.kd_loss_weight = own.LOSS.KD_WEIGHT
        # In a tuple, as it is a part of the teacher.
        self.classifiers = (pooled_classifier(teacher, "teacher", "SRRL", cfg, image_size),)
        self.connector = nn.Sequential(
            nn.Conv2d(self._width(cfg, image_size), self.classifiers[0].in_features, 1, bias=False),
            nn.BatchNorm2d(self.classifiers[0].in_features),
            nn.ReLU(),
        )

    def _width(self, cfg: CN, image_size: int | None) -> int:
        """Channels of the connector's input."""
        if self.on_map:
            return last_map_shape(self.student, "student", "SRRL", cfg, image_size)[0]
        features, _ = probe_pair(self.student, self.teacher, image_size or image_size_of(cfg))
        return features["pooled_feat"].flatten(1).shape[1]

    def get_learnable_parameters(self) -> list[nn.Parameter | Group]:
        return [*super().get_learnable_parameters(), *self.connector.parameters()]

    def get_extra_parameters(self) -> int:
        return count_parameters(self.connector)

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, Losses]:
        logits, features_s = self.student(image)
        logits_teacher, features_t = self.teacher_forward(image)
        x = features_s["last_map"] if self.on_map else features_s["pooled_feat"].flatten(1)[..., None, None]
        pooled, classifier = self.connector(x).mean((2, 3)), self.classifiers[0]
        pooled_teacher = features_t["pooled_feat"].flatten(1)
        feat, sr = srrl_losses(pooled, pooled_teacher, logits_teacher, classifier.weight, classifier.bias)
        losses = {
            "loss_ce": self.ce_loss_weight * self.cross_entropy(logits, target, **kwargs),
            "loss_feat": self.feat_loss_weight * feat,
            "loss_sr": self.sr_loss_weight * sr,
        }
        if self.kd_loss_weight > 0:
            losses["loss_kd"] = self.kd_loss_weight * kd_loss(logits, logits_teacher, self.temperature)
        return logits, losses
