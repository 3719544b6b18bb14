"""NormKD: KD or DKD whose temperature is, for each network and image, in proportion to the deviation of the logits."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch import Tensor
from yacs.config import CfgNode as CN

from ..ranges import NOT_NEGATIVE, TEMPERATURE, whole
from ._base import LogitDistiller, register, warm_up
from ._logits import centred_and_deviation, check_logits, check_two_classes
from ._precision import full_precision
from .DKD import dkd_loss
from .KD import kd_loss

# Stands in for a temperature of 0. Its square, the image's weight, is 0 in float32, and 1e-48 in float64.
_SMALLEST = 1e-24


@full_precision
def normkd_loss(logits_student: Tensor, logits_teacher: Tensor, norm: float) -> Tensor:
    """KL divergence from the teacher's prediction to the student's, at temperatures that fit each network and image.

        loss = mean_B[ T_t^2 * KL(softmax(z_t / T_t) || softmax(z_s / T_s)) ],   T = norm * std_C z

    with divisor C - 1. The student's deviation is not detached. Equal logits give a uniform prediction without
    gradient; those of the teacher give the image no weight, as T_t is 0. A class that is masked out by a teacher logit
    of -inf contributes 0, and does not count in the deviation.

    Args:
        logits_student: (B, C), before softmax.
        logits_teacher: (B, C); not detached here.
        norm: temperature > 0 of logits whose deviation is 1.

    Returns:
        () in nats times squared logits, >= 0, the student's dtype; float32 for half precision.

    Raises:
        ValueError: the shapes differ, or norm <= 0.

    Cost: O(B C).

    Reference: Chi et al. 2023, arXiv 2308.00520.
    """
    return kd_loss(*_rescaled(logits_student, logits_teacher, norm))


@full_precision
def normkd_dkd_loss(
    logits_student: Tensor, logits_teacher: Tensor, target: Tensor, alpha: float, beta: float, norm: float
) -> Tensor:
    """`dkd_loss` at the temperatures of `normkd_loss`; the factor of both terms is T_t^2.

    Args:
        target: (B,) int64, the labels in [0, C).
        alpha: weight of the target term (TCKD).
        beta: weight of the non-target term (NCKD).

    Raises:
        ValueError: as `normkd_loss`, or C < 2.
    """
    check_two_classes("NormKD over DKD", logits_student)
    student, teacher, temperature = _rescaled(logits_student, logits_teacher, norm)
    return dkd_loss(student, teacher, target, alpha, beta, temperature)


def _rescaled(logits_student: Tensor, logits_teacher: Tensor, norm: float) -> tuple[Tensor, Tensor, Tensor]:
    """The student's logits (B, C) with the teacher's deviation, the teacher's (B, C), and T_t (B, 1).

    So one temperature serves both networks: z_s (T_t / T_s) / T_t = z_s / T_s.
    """
    check_logits(logits_student, logits_teacher, norm)
    student, deviation = centred_and_deviation(logits_student)
    teacher, of_teacher = centred_and_deviation(logits_teacher)
    temperature = (norm * of_teacher).clamp(min=_SMALLEST)
    own = (norm * deviation).masked_fill(deviation == 0, 1)
    scale = (temperature / own).masked_fill(deviation == 0, 0)
    student, teacher = (
        centred.masked_fill(logits == -float("inf"), -float("inf"))
        for centred, logits in ((student * scale, logits_student), (teacher, logits_teacher))
    )
    return student, teacher, temperature


DEFAULTS = CN(
    {
        # The temperature of logits whose deviation is 1.
        "TEMPERATURE_NORM": 2.0,
        # Over DKD in place of KD, with ALPHA, BETA and WARMUP. LOSS weighs both forms; DKD's own weights are 1 and 1.
        "DKD": False,
        "ALPHA": 4.0,
        "BETA": 5.0,
        "WARMUP": 20,
        "LOSS": CN({"CE_WEIGHT": 0.1, "KD_WEIGHT": 0.9}),
    }
)
RANGES = {
    "TEMPERATURE_NORM": TEMPERATURE,
    "ALPHA": NOT_NEGATIVE,
    "BETA": NOT_NEGATIVE,
    "WARMUP": whole(0),
    "LOSS.CE_WEIGHT": NOT_NEGATIVE,
    "LOSS.KD_WEIGHT": NOT_NEGATIVE,
}


@register("NormKD", DEFAULTS, ranges=RANGES)
class NormKD(LogitDistiller):
    """Cross-entropy with the labels and `normkd_loss`, or, with NormKD.DKD, `normkd_dkd_loss`, with the teacher.

    Over DKD the weight of the loss grows linearly over the first WARMUP epochs.
    """

    teacher_outputs = ("logits",)

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN) -> None:
        super().__init__(student, teacher)
        own = cfg.NormKD
        self.norm = own.TEMPERATURE_NORM
        self.over_dkd = own.DKD
        self.ce_loss_weight = own.LOSS.CE_WEIGHT
        self.kd_loss_weight = own.LOSS.KD_WEIGHT
        self.alpha = own.ALPHA
        self.beta = own.BETA
        self.warmup = own.WARMUP
        # DKD's two terms are for one target class and for the others.
        self.reads_labels = own.DKD  # type: ignore[misc]

    @classmethod
    def label_weights(cls, cfg: CN) -> tuple[str, ...] | None:
        """That of the cross-entropy; None over DKD, which always needs labels."""
        return None if cfg.NormKD.DKD else ("NormKD.LOSS.CE_WEIGHT",)

    def logit_loss(self, logits_student: Tensor, logits_teacher: Tensor, target: Tensor, **kwargs: Any) -> Tensor:
        logits = logits_student, logits_teacher
        if self.over_dkd:
            loss_dkd = normkd_dkd_loss(*logits, target, self.alpha, self.beta, self.norm)
            return self.kd_loss_weight * warm_up(kwargs["epoch"], self.warmup) * loss_dkd
        return self.kd_loss_weight * normkd_loss(*logits, self.norm)
