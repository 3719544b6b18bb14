"""WTTM: TTM with a weight for each image, large where the teacher is uncertain."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode as CN

from ..ranges import NOT_NEGATIVE, TEMPERATURE
from ._base import register
from ._logits import softened
from ._precision import full_precision
from .TTM import TTM, powered_divergence


@full_precision
def wttm_loss(logits_student: Tensor, logits_teacher: Tensor, gamma: float, logit_stand: bool = False) -> Tensor:
    """`ttm_loss` whose images are weighted by the power sum of the teacher's prediction.

        loss = mean_B[ U * KL(q || p_s) ],   U = sum_C p_t^gamma,   q = p_t^gamma / U,   p = softmax(z)

    U grows from 1 for a certain teacher to C^(1 - gamma) for a uniform one, if gamma < 1: 63 for 0.1 and 100 classes.
    It is exp(logsumexp(gamma * log p_t)), in which no power underflows.

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
    divergence = powered_divergence(logits_student, logits_teacher, gamma, logit_stand)
    log_teacher = F.log_softmax(softened(logits_teacher, 1.0, logit_stand), dim=1)
    return ((gamma * log_teacher).logsumexp(dim=1).exp() * divergence).mean()


@register(
    "WTTM",
    CN({"GAMMA": 0.2, "LOSS": CN({"CE_WEIGHT": 1.0, "KD_WEIGHT": 4.0})}),
    ranges={"GAMMA": TEMPERATURE, "LOSS.CE_WEIGHT": NOT_NEGATIVE, "LOSS.KD_WEIGHT": NOT_NEGATIVE},
)
class WTTM(TTM):
    """Cross-entropy with the labels and `wttm_loss` with the teacher."""

    teacher_outputs = ("logits",)
    loss = staticmethod(wttm_loss)
