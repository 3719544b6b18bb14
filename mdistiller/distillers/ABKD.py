"""ABKD: the alpha-beta divergence between softened predictions, of which KL and reverse KL are special cases."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode as CN

from ..ranges import NOT_NEGATIVE, TEMPERATURE, interval
from ._base import LogitDistiller, register
from ._logits import Temperature, check_logits, logit_stand, softened
from ._precision import full_precision

# Of the powers of probabilities; floats do not hold those of larger ones.
EXPONENT = interval(-100, 100, "[]")


@full_precision
def ab_divergence(
    logits_student: Tensor,
    logits_teacher: Tensor,
    alpha: float,
    beta: float,
    temperature: Temperature,
    logit_stand: bool = False,
) -> Tensor:
    """Alpha-beta divergence between the teacher's softened prediction p and the student's q.

        loss = mean_B[ -1/(a b) * sum_C( p^a q^b - a/(a + b) p^(a + b) - b/(a + b) q^(a + b) ) ],   softmax(z / T)

    and its limits where a, b or a + b is 0: (1, 0) is KL(p || q), (0, 1) is KL(q || p), (1/2, 1/2) is twice the squared
    Euclidean distance of sqrt(p) and sqrt(q), (0, 0) is half that of log p and log q. It has no factor T^2. Nothing
    cancels where a, b or the difference between p and q is small.

    For a > 0 and b >= 0, a class that a teacher logit of -inf masks out contributes q^(a + b) / (a (a + b)), which for
    KL makes no difference. For a <= 0 the divergence from a teacher that excludes a class is infinite, or as large as
    floats are, as that of the reverse KL is.

    Args:
        logits_student: (B, C), before softmax.
        logits_teacher: (B, C); not detached here.
        alpha: a; large values weigh the classes that the teacher prefers.
        beta: b; large values weigh the classes that the student prefers.
        temperature: T > 0, or one for each image, (B, 1).
        logit_stand: standardise the logits of both networks first, see `_logits.standardized`.

    Returns:
        () >= 0, the student's dtype; float32 for half precision. In nats for a + b = 1.

    Raises:
        ValueError: the shapes differ, or T <= 0.

    Reference: Wang et al. 2025, arXiv 2505.04560; Cichocki et al. 2011, Entropy 13, 134-170.
    """
    check_logits(logits_student, logits_teacher, temperature)
    log_q, log_p = (
        # Logarithms of probabilities of 0, so that their differences are numbers too.
        F.log_softmax(softened(logits, temperature, logit_stand), dim=1).clamp(min=-torch.finfo(logits.dtype).max / 8)
        for logits in (logits_student, logits_teacher)
    )
    # The divergence is the same with (p, a) and (q, b) exchanged. The larger exponent is the one to divide by.
    if abs(alpha) >= abs(beta):
        terms = _terms(log_p, log_q, float(alpha), float(beta))
    else:
        terms = _terms(log_q, log_p, float(beta), float(alpha))
    return terms.sum(dim=1).mean()


def _terms(log_p: Tensor, log_q: Tensor, a: float, b: float) -> Tensor:
    """The addends of the divergence (B, C), for |a| >= |b|.

        t = ( (q^c - p^c) / c - p^a (q^b - p^b) / b ) / a,   c = a + b

    Where d = log q - log p is small, both fractions are about the same; there t is the series of

        p^c d^2 ( 1/2! + (c + b) d / 3! + (c^2 + c b + b^2) d^2 / 4! + ... )
    """
    c, difference = a + b, log_q - log_p
    near = (a * difference).abs() < _NEAR if a else torch.ones_like(difference, dtype=torch.bool)
    # Neither branch may make a NaN where the other one is taken: the gradient would be NaN too.
    d = difference.masked_fill(~near, 0) if a else difference
    series: float | Tensor = 0.0
    for order in reversed(range(_ORDER)):
        powers = sum(c ** (order - i) * b**i for i in range(order + 1))
        series = series * d + powers / math.factorial(order + 2)
    close = (c * log_p).exp() * d.square() * series
    if not a:
        return close
    far = (_power_difference(log_p, log_q, c) - (a * log_p).exp() * _power_difference(log_p, log_q, b)) / a
    return torch.where(near, close, far)


# Below |a d| = 0.02 the series of 6 terms has a relative error of 1e-12; above, the fractions lose two digits at most.
_NEAR, _ORDER = 0.02, 6


def _power_difference(log_p: Tensor, log_q: Tensor, x: float) -> Tensor:
    """(q^x - p^x) / x, and log q - log p for x = 0. Both powers are computed from the larger one."""
    d = log_q - log_p
    if x == 0:
        return d
    largest = torch.maximum(x * log_p, x * log_q).exp()
    return d.sign() * largest * torch.expm1(-abs(x) * d.abs()) / -abs(x)


@register(
    "ABKD",
    CN({"ALPHA": 0.9, "BETA": 0.2, "T": 4.0, "LOSS": CN({"CE_WEIGHT": 0.1, "KD_WEIGHT": 14.4})}),
    ranges={
        "ALPHA": EXPONENT, "BETA": EXPONENT, "T": TEMPERATURE,
        "LOSS.CE_WEIGHT": NOT_NEGATIVE, "LOSS.KD_WEIGHT": NOT_NEGATIVE,
    },
)  # fmt: skip
class ABKD(LogitDistiller):
    """Cross-entropy with the labels and KD_WEIGHT * `ab_divergence` with the teacher.

    The authors' training script for images is not published. The default weights are KD's 0.1 and, as the divergence
    has no factor T^2, 0.9 T^2 at T = 4; ALPHA and BETA are not the authors' either.
    """

    teacher_outputs = ("logits",)
    label_weight = "LOSS.CE_WEIGHT"
    standardizes_logits = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN) -> None:
        super().__init__(student, teacher)
        self.alpha, self.beta, self.temperature = cfg.ABKD.ALPHA, cfg.ABKD.BETA, cfg.ABKD.T
        self.ce_loss_weight = cfg.ABKD.LOSS.CE_WEIGHT
        self.kd_loss_weight = cfg.ABKD.LOSS.KD_WEIGHT
        self.logit_stand = logit_stand(cfg)

    def logit_loss(self, logits_student: Tensor, logits_teacher: Tensor, target: Tensor, **kwargs: Any) -> Tensor:
        settings = self.alpha, self.beta, self.temperature, self.logit_stand
        return self.kd_loss_weight * ab_divergence(logits_student, logits_teacher, *settings)
