"""Knowledge distillation: the student learns the teacher's softened prediction."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode as CN

from ..ranges import NOT_NEGATIVE, TEMPERATURE
from ._base import LogitDistiller, Losses, register
from ._decoupled import decoupled_losses
from ._logits import Temperature, check_logits, kl_divergence, logit_stand, softened, tempered_mean
from ._precision import full_precision


@full_precision
def kd_loss(
    logits_student: Tensor, logits_teacher: Tensor, temperature: Temperature, logit_stand: bool = False
) -> Tensor:
    """KL divergence from the teacher's softened prediction to the student's.

        loss = T^2 * mean_B[ sum_C p_t * (log p_t - log p_s) ],   p = softmax(z / T)

    A class that is masked out by a teacher logit of -inf contributes 0. Where only the student's logit is -inf, the
    loss is infinite.

    Args:
        logits_student: (B, C), before softmax.
        logits_teacher: (B, C); not detached here.
        temperature: T > 0, or one for each image, (B, 1); the factor T^2 keeps the gradient's scale as T grows.
        logit_stand: standardise the logits of both networks first, see `_logits.standardized`.

    Returns:
        () in nats, >= 0, the student's dtype; float32 for half precision.

    Raises:
        ValueError: the shapes differ, or T <= 0.

    Reference: Hinton et al. 2015, arXiv 1503.02531, section 2.1.
    """
    check_logits(logits_student, logits_teacher, temperature)
    log_student = F.log_softmax(softened(logits_student, temperature, logit_stand), dim=1)
    log_teacher = F.log_softmax(softened(logits_teacher, temperature, logit_stand), dim=1)
    return tempered_mean(kl_divergence(log_student, log_teacher), temperature)


@register(
    "KD",
    CN({"TEMPERATURE": 4, "LOSS": CN({"CE_WEIGHT": 0.1, "KD_WEIGHT": 0.9})}),
    ranges={"TEMPERATURE": TEMPERATURE, "LOSS.CE_WEIGHT": NOT_NEGATIVE, "LOSS.KD_WEIGHT": NOT_NEGATIVE},
)
class KD(LogitDistiller):
    """Cross-entropy with the labels and `kd_loss` with the teacher.

    Decoupled, it has the two parts of `decoupled_losses`, of weight 1, in place of `kd_loss`; KD_WEIGHT has no effect.
    """

    teacher_outputs = ("logits",)
    label_weight = "LOSS.CE_WEIGHT"
    standardizes_logits = True
    decouples = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN) -> None:
        super().__init__(student, teacher)
        self.temperature = cfg.KD.TEMPERATURE
        self.ce_loss_weight = cfg.KD.LOSS.CE_WEIGHT
        self.kd_loss_weight = cfg.KD.LOSS.KD_WEIGHT
        self.logit_stand = logit_stand(cfg)

    def logit_loss(self, logits_student: Tensor, logits_teacher: Tensor, target: Tensor, **kwargs: Any) -> Tensor:
        loss = kd_loss(logits_student, logits_teacher, self.temperature, self.logit_stand)
        return self.kd_loss_weight * loss

    def forward_decoupled(self, image: Tensor, target: Tensor, top: int = 0, **kwargs: Any) -> tuple[Tensor, Losses]:
        logits_student, _ = self.student(image)
        logits_teacher, _ = self.teacher_forward(image)
        loss_tckd, loss_nckd = decoupled_losses(
            logits_student, logits_teacher, target, self.temperature, top, by_doubt=True, logit_stand=self.logit_stand
        )
        return logits_student, {
            "loss_task": self.ce_loss_weight * self.cross_entropy(logits_student, target, **kwargs),
            "loss_tckd": loss_tckd,
            "loss_nckd": loss_nckd,
        }
