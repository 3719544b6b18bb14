"""Decoupled knowledge distillation: one loss term for the target against the rest, one for the other classes."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch import Tensor
from yacs.config import CfgNode as CN

from ..ranges import NOT_NEGATIVE, TEMPERATURE, whole
from ._base import LogitDistiller, Losses, register, warm_up
from ._decoupled import decoupled_losses, decoupled_parts
from ._logits import Temperature, logit_stand, tempered_mean
from ._precision import full_precision


@full_precision
def dkd_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    temperature: Temperature,
    logit_stand: bool = False,
) -> Tensor:
    """Weighted sum of two KL divergences from the teacher's softened prediction to the student's.

        loss = T^2 * mean_B[ alpha * KL(b_t || b_s) + beta * KL(q_t || q_s) ],   p = softmax(z / T)
        b = (p_y, 1 - p_y),   q = softmax(z / T) over the classes other than y

    Both terms are computed from log-probabilities: value and gradient are finite for logits any distance apart.
    Of two classes only one is not the target: q = (1,) for both networks, and the second term is exactly 0.

    A class that is masked out by a teacher logit of -inf contributes 0 to both terms. If all but the target are masked
    out, the image's second term is 0. Where only the student's logit is -inf, the loss is infinite.

    Args:
        logits_student: (B, C), C >= 2, before softmax.
        logits_teacher: (B, C); not detached here.
        target: (B,) int64, the labels y in [0, C).
        alpha: weight of the target term (TCKD).
        beta: weight of the non-target term (NCKD).
        temperature: T > 0, or one for each image, (B, 1).
        logit_stand: standardise the logits of both networks first, see `_logits.standardized`.

    Returns:
        () in nats, >= 0, the student's dtype; float32 for half precision.

    Raises:
        ValueError: the shapes differ, T <= 0, or C < 2.

    Reference: Zhao et al. 2022, arXiv 2203.08679, equation 7.
    """
    parts = decoupled_parts(logits_student, logits_teacher, target, temperature, logit_stand=logit_stand)
    return tempered_mean(alpha * parts.target + beta * parts.others, temperature)


@register(
    "DKD",
    CN({"CE_WEIGHT": 1.0, "ALPHA": 1.0, "BETA": 8.0, "T": 4.0, "WARMUP": 20}),
    ranges={
        "CE_WEIGHT": NOT_NEGATIVE, "ALPHA": NOT_NEGATIVE, "BETA": NOT_NEGATIVE, "T": TEMPERATURE, "WARMUP": whole(0),
    },
)
class DKD(LogitDistiller):
    """Cross-entropy with the labels and `dkd_loss` with the teacher.

    The weight of `dkd_loss` grows linearly over the first WARMUP epochs. Decoupled, it has the two parts of
    `decoupled_losses`, with ALPHA and BETA, which grow likewise.
    """

    teacher_outputs = ("logits",)
    standardizes_logits = True
    reads_labels = True  # its two terms are for one target class and for the others
    decouples = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN) -> None:
        super().__init__(student, teacher)
        self.ce_loss_weight = cfg.DKD.CE_WEIGHT
        self.alpha = cfg.DKD.ALPHA
        self.beta = cfg.DKD.BETA
        self.temperature = cfg.DKD.T
        self.warmup = cfg.DKD.WARMUP
        self.logit_stand = logit_stand(cfg)

    def logit_loss(self, logits_student: Tensor, logits_teacher: Tensor, target: Tensor, **kwargs: Any) -> Tensor:
        weights = self.alpha, self.beta
        loss = dkd_loss(logits_student, logits_teacher, target, *weights, self.temperature, self.logit_stand)
        return warm_up(kwargs["epoch"], self.warmup) * loss

    def forward_decoupled(self, image: Tensor, target: Tensor, top: int = 0, **kwargs: Any) -> tuple[Tensor, Losses]:
        logits_student, _ = self.student(image)
        logits_teacher, _ = self.teacher_forward(image)
        loss_tckd, loss_nckd = decoupled_losses(
            logits_student, logits_teacher, target, self.temperature, top, logit_stand=self.logit_stand
        )
        factor = warm_up(kwargs["epoch"], self.warmup)
        return logits_student, {
            "loss_task": self.ce_loss_weight * self.cross_entropy(logits_student, target, **kwargs),
            "loss_tckd": factor * self.alpha * loss_tckd,
            "loss_nckd": factor * self.beta * loss_nckd,
        }
