"""Dual-head knowledge distillation: a second head learns the teacher's logits, the first one the labels alone."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from yacs.config import CfgNode as CN

from ..models.cost import count_parameters
from ..models.parameters import Group
from ..ranges import NOT_NEGATIVE, TEMPERATURE, one_of, whole
from ._base import Distiller, Losses, register
from ._feature_maps import probe, probe_pair
from ._logits import Temperature, check_logits, softened, tempered_mean
from ._precision import full_precision

# The sigmoid is held between this and 1 minus it; then the difference of the logits, / T, is at most `_FARTHEST`.
_LEAST = 1e-8
_FARTHEST = math.log((1 - _LEAST) / _LEAST)
# Layers of the nonlinear head, as its paper's code has them.
_HIDDEN, _DROPOUT = 200, 0.1


@full_precision
def dhkd_loss(logits_student: Tensor, logits_teacher: Tensor, temperature: Temperature) -> Tensor:
    """The binary loss of the second head: for each class, how far its sigmoid of the difference is from a half.

        loss = T^2 * mean_B[ sum_C( ln 0.5 - (ln sigma(d) + ln(1 - sigma(d))) / 2 ) ],   d = (z_s - z_t) / T

    with sigma(d) held in [1e-8, 1 - 1e-8]. A term is KL((1/2, 1/2) || (sigma(d), 1 - sigma(d))) = ln cosh(d / 2). It is
    computed as log1p(2 sinh(d / 4)^2), which neither cancels for a small d nor overflows. Its gradient is
    tanh(d / 2) / 2, and 0 where the clamp holds sigma: where |z_s - z_t| > 18.42 T, a term is constant.

    A class that is masked out by a teacher logit of -inf contributes 0.

    Args:
        logits_student: (B, C), of the second head.
        logits_teacher: (B, C); not detached here.
        temperature: T > 0, or one for each image, (B, 1).

    Returns:
        () in nats, >= 0, the student's dtype; float32 for half precision.

    Raises:
        ValueError: the shapes differ, or T <= 0.

    Reference: Yang et al. 2024, arXiv 2411.08937, equation 8.
    """
    check_logits(logits_student, logits_teacher, temperature)
    masked = logits_teacher == -torch.inf
    difference = logits_student.masked_fill(masked, 0) - logits_teacher.masked_fill(masked, 0)
    d = softened(difference, temperature).clamp(-_FARTHEST, _FARTHEST)
    terms = torch.log1p(2 * torch.sinh(d / 4).square())
    return tempered_mean(terms.sum(dim=1), temperature)


def linear_head(dim_in: int, classes: int) -> nn.Module:
    return nn.Linear(dim_in, classes)


def nonlinear_head(dim_in: int, classes: int) -> nn.Module:
    """A hidden layer of 200 with dropout and BatchNorm."""
    return nn.Sequential(
        nn.Linear(dim_in, _HIDDEN), nn.Dropout(_DROPOUT), nn.BatchNorm1d(_HIDDEN), nn.ReLU(),
        nn.Linear(_HIDDEN, classes),
    )  # fmt: skip


HEADS = {"linear": linear_head, "nonlinear": nonlinear_head}


@register(
    "DHKD",
    CN({
        "TEMPERATURE": 2.0, "HEAD": "linear", "STOP_EPOCH": 0, "LOSS": CN({"CE_WEIGHT": 1.0, "KD_WEIGHT": 1.0}),
    }),
    ranges={
        "TEMPERATURE": TEMPERATURE, "HEAD": one_of(*HEADS), "STOP_EPOCH": whole(0), "LOSS.CE_WEIGHT": NOT_NEGATIVE,
        "LOSS.KD_WEIGHT": NOT_NEGATIVE,
    },
)  # fmt: skip
class DHKD(Distiller):
    """Cross-entropy of the student's own head, and `dhkd_loss` of a second head on its pooled feature.

    The second head, linear or with a hidden layer (HEAD), is used in training alone: the student is deployed. From
    epoch STOP_EPOCH on the weight of `dhkd_loss` is 0; STOP_EPOCH 0: never. The paper's gradient alignment is
    SOLVER.TRAINER aligned.
    """

    needs_run = ("image_size",)
    teacher_outputs = ("logits",)
    soft_labels = True
    # No `label_weight`: without labels, nothing would train the head that is deployed.

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN, image_size: int) -> None:
        super().__init__(student, teacher)
        self.temperature = cfg.DHKD.TEMPERATURE
        self.stop_epoch = cfg.DHKD.STOP_EPOCH
        self.ce_loss_weight = cfg.DHKD.LOSS.CE_WEIGHT
        self.kd_loss_weight = cfg.DHKD.LOSS.KD_WEIGHT
        features, _ = probe_pair(student, teacher, image_size)
        logits, _ = probe(student, (image_size, image_size))
        self.head = HEADS[cfg.DHKD.HEAD](features["pooled_feat"].shape[1], logits.shape[1])

    def get_learnable_parameters(self) -> list[nn.Parameter | Group]:
        return [*super().get_learnable_parameters(), *self.head.parameters()]

    def get_extra_parameters(self) -> int:
        return count_parameters(self.head)

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, Losses]:
        logits_student, features = self.student(image)
        logits_teacher, _ = self.teacher_forward(image)
        loss_kd = dhkd_loss(self.head(features["pooled_feat"]), logits_teacher, self.temperature)
        return logits_student, {
            "loss_ce": self.ce_loss_weight * self.cross_entropy(logits_student, target, **kwargs),
            "loss_kd": self.kd_loss_weight * self._share(kwargs["epoch"]) * loss_kd,
        }

    def _share(self, epoch: int | Tensor) -> float | Tensor:
        """1 before STOP_EPOCH, then 0; a tensor () for the tensor () that a compiled step gets."""
        if not self.stop_epoch:
            return 1.0
        before = epoch < self.stop_epoch
        return before.float() if isinstance(before, Tensor) else float(before)
