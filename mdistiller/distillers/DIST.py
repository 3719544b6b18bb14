"""DIST: the student keeps the correlations of the teacher's predictions, within each image and within each class."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from yacs.config import CfgNode as CN

from ..distributed.gather import gather_batch
from ..ranges import NOT_NEGATIVE, TEMPERATURE
from ._base import LogitDistiller, register
from ._logits import check_logits, softened
from ._precision import full_precision

# Added to the product of two norms: constant predictions have correlation 0.
_EPS = 1e-8


@full_precision
def dist_loss(
    logits_student: Tensor, logits_teacher: Tensor, tau: float, beta: float = 1.0, gamma: float = 1.0
) -> Tensor:
    """Pearson correlations between the two networks' predictions, each subtracted from 1.

        loss = tau^2 * (beta * inter + gamma * intra),   p = softmax(z / tau)
        inter = 1 - mean_B[ r(p_s[i, :], p_t[i, :]) ],   intra = 1 - mean_C[ r(p_s[:, j], p_t[:, j]) ]
        r(a, b) = <a - mean a, b - mean b> / (|a - mean a| |b - mean b| + 1e-8)

    Of a batch of one, intra is 1, without gradient; likewise of a class that is masked out by teacher logits of -inf.

    Args:
        logits_student: (B, C), before softmax.
        logits_teacher: (B, C); not detached here.
        tau: temperature > 0.
        beta: weight of the relation between the classes of an image.
        gamma: weight of the relation between the images of a class.

    Returns:
        () in [0, 2 tau^2 (beta + gamma)], the student's dtype; float32 for half precision.

    Raises:
        ValueError: the shapes differ, or tau <= 0.

    Cost: O(B C). In float64 throughout, as almost certain predictions leave columns of tiny differences.

    Reference: Huang et al. 2022, arXiv 2205.10536.
    """
    check_logits(logits_student, logits_teacher, tau)
    p_s, p_t = (softened(z.double(), tau).softmax(dim=1) for z in (logits_student, logits_teacher))
    inter, intra = (1 - _correlations(p_s, p_t, dim=dim).mean() for dim in (1, 0))
    return (tau**2 * (beta * inter + gamma * intra)).to(logits_student.dtype)


def _correlations(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """r (B,) of the rows for `dim` 1, (C,) of the columns for `dim` 0."""
    a, b = (x - x.mean(dim=dim, keepdim=True) for x in (a, b))
    norms = [torch.linalg.vector_norm(x, dim=dim) for x in (a, b)]
    return (a * b).sum(dim=dim) / (norms[0] * norms[1] + _EPS)


@register(
    "DIST",
    CN({"TAU": 4.0, "BETA": 1.0, "GAMMA": 1.0, "LOSS": CN({"CE_WEIGHT": 1.0, "KD_WEIGHT": 2.0})}),
    ranges={
        "TAU": TEMPERATURE,
        "BETA": NOT_NEGATIVE,
        "GAMMA": NOT_NEGATIVE,
        "LOSS.CE_WEIGHT": NOT_NEGATIVE,
        "LOSS.KD_WEIGHT": NOT_NEGATIVE,
    },
)
class DIST(LogitDistiller):
    """Cross-entropy with the labels and `dist_loss` with the teacher.

    The paper's beta and gamma of 2 are KD_WEIGHT here.
    """

    compares_images = True
    teacher_outputs = ("logits",)
    label_weight = "LOSS.CE_WEIGHT"

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN) -> None:
        super().__init__(student, teacher)
        self.tau = cfg.DIST.TAU
        self.beta = cfg.DIST.BETA
        self.gamma = cfg.DIST.GAMMA
        self.ce_loss_weight = cfg.DIST.LOSS.CE_WEIGHT
        self.kd_loss_weight = cfg.DIST.LOSS.KD_WEIGHT

    def logit_loss(self, logits_student: Tensor, logits_teacher: Tensor, target: Tensor, **kwargs: Any) -> Tensor:
        logits = gather_batch(logits_student), gather_batch(logits_teacher)
        return self.kd_loss_weight * dist_loss(*logits, self.tau, self.beta, self.gamma)
