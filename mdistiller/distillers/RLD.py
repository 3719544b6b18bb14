"""RLD: the teacher's confidence and its ranking of the classes below the label, without what it ranks above it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode as CN

from ..ranges import NOT_NEGATIVE, TEMPERATURE, whole
from ._base import LogitDistiller, register, warm_up
from ._logits import (
    Temperature,
    check_logits,
    check_two_classes,
    kl_divergence,
    logit_stand,
    one_against_others,
    softened,
    tempered_mean,
)
from ._precision import full_precision


@full_precision
def rld_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    temperature: Temperature,
    alpha_temperature: Temperature,
    logit_stand: bool = False,
) -> Tensor:
    """Weighted sum of two KL divergences from a prediction of the teacher, refined by the label, to the student's.

        loss = alpha * T_a^2 * mean_B[ KL(b_t || b_s) ] + beta * T^2 * mean_B[ KL(q_t || q_s) ]
        b_t = (max_C p_t, 1 - max_C p_t),   b_s = (p_s(y), 1 - p_s(y)),   p = softmax(z / T_a)
        q = softmax(z / T) over the classes c with z_t(c) < z_t(y)

    The first term (SCD) hands on the teacher's confidence, whichever class it is in. The second (MCD) leaves out the
    target and every class that the teacher ranks above it, or level with it. Both are computed from log-probabilities,
    b from log-odds: value and gradient are finite for logits any distance apart.

    An image of which no class is left, as the target is the teacher's smallest, has no second term: 0, with gradient 0.
    A class that is masked out by a teacher logit of -inf contributes 0. Where only the student's logit is -inf, the
    loss is infinite.

    Args:
        logits_student: (B, C), C >= 2, before softmax.
        logits_teacher: (B, C); not detached here.
        target: (B,) int64, the labels y in [0, C).
        alpha: weight of the first term.
        beta: weight of the second term.
        temperature: T > 0 of the second term, or one for each image, (B, 1).
        alpha_temperature: T_a, likewise, of the first term.
        logit_stand: standardise the logits of both networks first, see `_logits.standardized`.

    Returns:
        () in nats, >= 0, the student's dtype; float32 for half precision.

    Raises:
        ValueError: the shapes differ, a temperature <= 0, or C < 2.

    Cost: O(B C).

    Reference: Sun et al. 2024, arXiv 2408.07703.
    """
    check_two_classes("RLD", logits_student)
    for own in (temperature, alpha_temperature):
        check_logits(logits_student, logits_teacher, own)
    largest = logits_teacher.argmax(dim=1)
    binary_student, _ = one_against_others(softened(logits_student, alpha_temperature, logit_stand), target)
    binary_teacher, _ = one_against_others(softened(logits_teacher, alpha_temperature, logit_stand), largest)
    scd = kl_divergence(binary_student, binary_teacher)

    kept = logits_teacher < logits_teacher.gather(1, target.unsqueeze(1))
    # Of the classes that are left, one must be possible for the teacher.
    empty = ~(kept & (logits_teacher > -torch.inf)).any(dim=1, keepdim=True)
    mcd = kl_divergence(
        *(
            _log_softmax_of(kept, empty, softened(z, temperature, logit_stand))
            for z in (logits_student, logits_teacher)
        )
    )
    return alpha * tempered_mean(scd, alpha_temperature) + beta * tempered_mean(mcd, temperature)


def _log_softmax_of(kept: Tensor, empty: Tensor, logits: Tensor) -> Tensor:
    """log softmax (B, C) over the `kept` classes, -inf for the others; the rows in `empty` (B, 1) are uniform."""
    return F.log_softmax(logits.masked_fill(~kept, -torch.inf).masked_fill(empty, 0), dim=1)


@register(
    "RLD",
    CN({"CE_WEIGHT": 1.0, "ALPHA": 1.0, "BETA": 8.0, "T": 4.0, "ALPHA_T": 1.0, "WARMUP": 20}),
    ranges={
        "CE_WEIGHT": NOT_NEGATIVE, "ALPHA": NOT_NEGATIVE, "BETA": NOT_NEGATIVE, "T": TEMPERATURE,
        "ALPHA_T": TEMPERATURE, "WARMUP": whole(0),
    },
)  # fmt: skip
class RLD(LogitDistiller):
    """Cross-entropy with the labels and `rld_loss` with the teacher.

    The weight of `rld_loss` grows linearly over the first WARMUP epochs. The authors standardise logits
    (EXPERIMENT.LOGIT_STAND) with ALPHA_T = T, and with ALPHA and BETA multiplied by one weight, such as 9.
    """

    teacher_outputs = ("logits",)
    standardizes_logits = True
    reads_labels = True  # what it leaves out depends on the one label

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN) -> None:
        super().__init__(student, teacher)
        self.ce_loss_weight = cfg.RLD.CE_WEIGHT
        self.alpha = cfg.RLD.ALPHA
        self.beta = cfg.RLD.BETA
        self.temperature = cfg.RLD.T
        self.alpha_temperature = cfg.RLD.ALPHA_T
        self.warmup = cfg.RLD.WARMUP
        self.logit_stand = logit_stand(cfg)

    def logit_loss(self, logits_student: Tensor, logits_teacher: Tensor, target: Tensor, **kwargs: Any) -> Tensor:
        weights, temperatures = (self.alpha, self.beta), (self.temperature, self.alpha_temperature)
        loss = rld_loss(logits_student, logits_teacher, target, *weights, *temperatures, self.logit_stand)
        return warm_up(kwargs["epoch"], self.warmup) * loss
