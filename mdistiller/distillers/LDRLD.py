"""LDRLD: every pair of the student's strongest classes is a distribution of two to learn from the teacher."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode as CN

from ..ranges import NOT_NEGATIVE, TEMPERATURE, whole
from ._base import LogitDistiller, register
from ._logits import Temperature, check_logits, kl_divergence, logit_stand, softened, tempered_mean
from ._precision import full_precision


@full_precision
def ldrld_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    k: int,
    alpha: float,
    beta: float,
    temperature: Temperature,
    logit_stand: bool = False,
) -> Tensor:
    """KL divergences from the teacher's to the student's distributions over pairs of classes, and over groups of them.

        loss = T^2 * mean_B[ alpha * local + beta * rest ],   softmax(z / T)
        local = ( sum_{a < b} w_ab KL_{a, b} + KL_{0 .. k-1} ) / (k (k - 1) / 2 + 1)
        w_ab = 2 exp(-0.05 (a + b + 2)) / (1.5 + b - a)

    0 to k - 1 are the student's k largest logits in falling order, of equal ones the first class first; their choice
    has no gradient. Each KL is between the distributions over the classes that it names alone, and rest is the KL over
    the other C - k classes. With C <= k classes all of them are ranked, and rest is 0.

    A class that a teacher logit of -inf masks out contributes 0, and so does a KL all of whose classes are masked out.
    Where only the student's logit is -inf, the loss is infinite.

    It takes B C log C operations to rank the classes, and B k^2 for the pairs.

    Args:
        logits_student: (B, C), before softmax.
        logits_teacher: (B, C); not detached here.
        k: number of classes that are ranked.
        alpha, beta: the weights.
        temperature: T > 0, or one for each image, (B, 1).
        logit_stand: standardise the logits of both networks first, see `_logits.standardized`.

    Returns:
        () in nats, >= 0, the student's dtype; float32 for half precision.

    Raises:
        ValueError: the shapes differ, or T <= 0.

    Reference: Xu et al. 2025, arXiv 2507.15911, section 3.
    """
    check_logits(logits_student, logits_teacher, temperature)
    order = logits_student.detach().sort(dim=1, descending=True, stable=True).indices
    student, teacher = (
        softened(logits, temperature, logit_stand).gather(1, order) for logits in (logits_student, logits_teacher)
    )
    k = min(k, student.shape[1])
    first, second = torch.triu_indices(k, k, offset=1, device=order.device)
    distance, place = (x.to(student.dtype) for x in (second - first, first + second))
    weight = 2 * torch.exp(-0.05 * (place + 2)) / (1.5 + distance)
    pairs = _group_kl(*(torch.stack([z[:, first], z[:, second]], dim=1) for z in (student, teacher)))
    local = (pairs * weight).sum(dim=1) + _group_kl(student[:, :k], teacher[:, :k])
    values = alpha * local / (len(weight) + 1)
    if student.shape[1] > k:
        values = values + beta * _group_kl(student[:, k:], teacher[:, k:])
    return tempered_mean(values, temperature)


def _group_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL over the n classes of dimension 1: (B, n, ...) -> (B, ...); 0 where the teacher excludes all of them."""
    empty = (teacher == -torch.inf).all(dim=1, keepdim=True)
    # Zeros stand in for what excludes every class, whose log_softmax, and its gradient, is NaN.
    student, teacher = student.masked_fill(empty, 0), teacher.masked_fill(empty, 0)
    kl = kl_divergence(F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1))
    return kl.masked_fill(empty.squeeze(1), 0)


@register(
    "LDRLD",
    CN({"K": 7, "T": 4.0, "ALPHA": 10.5, "BETA": 7.0, "CE_WEIGHT": 1.0}),
    ranges={
        "K": whole(1), "T": TEMPERATURE, "ALPHA": NOT_NEGATIVE, "BETA": NOT_NEGATIVE, "CE_WEIGHT": NOT_NEGATIVE,
    },
)  # fmt: skip
class LDRLD(LogitDistiller):
    """Cross-entropy with the labels and `ldrld_loss` with the teacher; the defaults are of resnet32x4, resnet8x4."""

    teacher_outputs = ("logits",)
    label_weight = "CE_WEIGHT"
    standardizes_logits = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN) -> None:
        super().__init__(student, teacher)
        self.k, self.alpha, self.beta = cfg.LDRLD.K, cfg.LDRLD.ALPHA, cfg.LDRLD.BETA
        self.temperature = cfg.LDRLD.T
        self.ce_loss_weight = cfg.LDRLD.CE_WEIGHT
        self.logit_stand = logit_stand(cfg)

    def logit_loss(self, logits_student: Tensor, logits_teacher: Tensor, target: Tensor, **kwargs: Any) -> Tensor:
        settings = self.k, self.alpha, self.beta, self.temperature, self.logit_stand
        return ldrld_loss(logits_student, logits_teacher, *settings)
