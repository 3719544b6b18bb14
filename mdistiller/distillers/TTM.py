"""TTM: the student, at temperature 1, learns the teacher's prediction raised to a power below 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode as CN

from ..ranges import NOT_NEGATIVE, TEMPERATURE
from ._base import LogitDistiller, register
from ._logits import check_logits, kl_divergence, logit_stand, softened
from ._precision import full_precision


@full_precision
def ttm_loss(logits_student: Tensor, logits_teacher: Tensor, gamma: float, logit_stand: bool = False) -> Tensor:
    """KL divergence from a power of the teacher's prediction to the student's.

        loss = mean_B[ KL(q || p_s) ],   q = p_t^gamma / sum_C p_t^gamma,   p = softmax(z)

    The teacher alone is softened, at temperature 1 / gamma; so there is no factor T^2. A class that is masked out by a
    teacher logit of -inf contributes 0.

    Args:
        logits_student: (B, C), before softmax.
        logits_teacher: (B, C); not detached here.
        gamma: the power > 0.
        logit_stand: standardise the logits of both networks first, see `_logits.standardized`.

    Returns:
        () in nats, >= 0, the student's dtype; float32 for half precision.

    Raises:
        ValueError: the shapes differ, or gamma <= 0.

    Cost: O(B C).

    Reference: Zheng and Yang 2024, arXiv 2402.11148.
    """
    return powered_divergence(logits_student, logits_teacher, gamma, logit_stand).mean()


def powered_divergence(
    logits_student: Tensor, logits_teacher: Tensor, gamma: float, logit_stand: bool = False
) -> Tensor:
    """KL(q || p_s) of `ttm_loss` for each image, (B,) in nats."""
    if gamma <= 0:
        raise ValueError(f"the power gamma must be positive, it is {gamma}")
    check_logits(logits_student, logits_teacher)
    log_student = F.log_softmax(softened(logits_student, 1.0, logit_stand), dim=1)
    log_teacher = F.log_softmax(softened(logits_teacher, 1 / gamma, logit_stand), dim=1)
    return kl_divergence(log_student, log_teacher)


@register(
    "TTM",
    CN({"GAMMA": 0.1, "LOSS": CN({"CE_WEIGHT": 1.0, "KD_WEIGHT": 45.0})}),
    ranges={"GAMMA": TEMPERATURE, "LOSS.CE_WEIGHT": NOT_NEGATIVE, "LOSS.KD_WEIGHT": NOT_NEGATIVE},
)
class TTM(LogitDistiller):
    """Cross-entropy with the labels and `ttm_loss` with the teacher."""

    teacher_outputs = ("logits",)
    label_weight = "LOSS.CE_WEIGHT"
    standardizes_logits = True
    loss: ClassVar[Callable[..., Tensor]] = staticmethod(ttm_loss)

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN) -> None:
        super().__init__(student, teacher)
        own = cfg[self.config_section]
        self.gamma = own.GAMMA
        self.ce_loss_weight = own.LOSS.CE_WEIGHT
        self.kd_loss_weight = own.LOSS.KD_WEIGHT
        self.logit_stand = logit_stand(cfg)

    def logit_loss(self, logits_student: Tensor, logits_teacher: Tensor, target: Tensor, **kwargs: Any) -> Tensor:
        return self.kd_loss_weight * self.loss(logits_student, logits_teacher, self.gamma, self.logit_stand)
