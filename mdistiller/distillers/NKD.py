"""NKD: cross-entropies with the teacher's prediction of the target, and with its prediction among the other classes."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode as CN

from ..ranges import NOT_NEGATIVE, TEMPERATURE
from ._base import LogitDistiller, register
from ._logits import (
    Temperature,
    check_logits,
    check_two_classes,
    logit_stand,
    one_against_others,
    soft_cross_entropy,
    softened,
    tempered_mean,
)
from ._precision import full_precision


@full_precision
def nkd_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    temperature: Temperature,
    gamma: float,
    logit_stand: bool = False,
) -> Tensor:
    """Cross-entropy between the predictions of the target, and between those of the other classes, normalised.

        loss = mean_B[ -p_t(y) * log p_s(y) - gamma * T^2 * sum_{j != y} n_t(j) * log n_s(j) ]
        p = softmax(z),   n = softmax(z / T) over the classes other than y

    Cross-entropies, so not 0 for equal networks. Of two classes only one is not the target: the second term is 0.

    A class that is masked out by a teacher logit of -inf contributes 0. If all but the target are masked out, the
    image's second term is 0. Where only the student's logit is -inf, the loss is infinite.

    Args:
        logits_student: (B, C), C >= 2, before softmax.
        logits_teacher: (B, C); not detached here.
        target: (B,) int64, the labels y in [0, C).
        temperature: T > 0 of the second term, or one for each image, (B, 1).
        gamma: weight of the second term.
        logit_stand: standardise the logits of both networks first, see `_logits.standardized`.

    Returns:
        () in nats, >= 0, the student's dtype; float32 for half precision.

    Raises:
        ValueError: the shapes differ, T <= 0, or C < 2.

    Cost: O(B C).

    Reference: Yang et al. 2023, arXiv 2303.13005.
    """
    check_logits(logits_student, logits_teacher, temperature)
    check_two_classes("NKD", logits_student)
    networks = logits_student, logits_teacher
    log_p_s, log_p_t = (_of_target(softened(z, 1.0, logit_stand), target) for z in networks)
    log_n_s, log_n_t = (one_against_others(softened(z, temperature, logit_stand), target)[1] for z in networks)
    of_target = soft_cross_entropy(log_p_s, log_p_t)
    return of_target.mean() + gamma * tempered_mean(soft_cross_entropy(log_n_s, log_n_t), temperature)


def _of_target(logits: Tensor, target: Tensor) -> Tensor:
    """log p(y) as (B, 1)."""
    return F.log_softmax(logits, dim=1).gather(1, target.unsqueeze(1))


@register(
    "NKD",
    CN({"TEMPERATURE": 1.0, "GAMMA": 1.5, "LOSS": CN({"CE_WEIGHT": 1.0, "KD_WEIGHT": 1.0})}),
    ranges={
        "TEMPERATURE": TEMPERATURE,
        "GAMMA": NOT_NEGATIVE,
        "LOSS.CE_WEIGHT": NOT_NEGATIVE,
        "LOSS.KD_WEIGHT": NOT_NEGATIVE,
    },
)
class NKD(LogitDistiller):
    """Cross-entropy with the labels and `nkd_loss` with the teacher. The defaults are those of ImageNet."""

    teacher_outputs = ("logits",)
    standardizes_logits = True
    reads_labels = True  # its two terms are for one target class and for the others

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN) -> None:
        super().__init__(student, teacher)
        self.temperature = cfg.NKD.TEMPERATURE
        self.gamma = cfg.NKD.GAMMA
        self.ce_loss_weight = cfg.NKD.LOSS.CE_WEIGHT
        self.kd_loss_weight = cfg.NKD.LOSS.KD_WEIGHT
        self.logit_stand = logit_stand(cfg)

    def logit_loss(self, logits_student: Tensor, logits_teacher: Tensor, target: Tensor, **kwargs: Any) -> Tensor:
        settings = self.temperature, self.gamma, self.logit_stand
        return self.kd_loss_weight * nkd_loss(logits_student, logits_teacher, target, *settings)
