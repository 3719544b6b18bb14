"""Probabilistic knowledge transfer: each image is to have the same neighbours for the student as for the teacher."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor
from torch.linalg import vector_norm
from yacs.config import CfgNode as CN

from ..distributed.gather import gather_batch
from ..ranges import NOT_NEGATIVE
from ._base import FeatureDistiller, Features, register
from ._precision import full_precision


@full_precision
def pkt_loss(f_s: Tensor, f_t: Tensor, eps: float = 1e-7) -> Tensor:
    """KL divergence between the two networks' neighbour probabilities within the batch.

        loss = mean_(i, j)[ p_t[i, j] * log( (p_t[i, j] + eps) / (p_s[i, j] + eps) ) ]
        p[i, j] = k[i, j] / sum_j k[i, j],   k = (1 + cosine) / 2

    A zero vector has cosine 0 with every vector.

    Args:
        f_s: the student's (B, D_s).
        f_t: the teacher's (B, D_t).
        eps: keeps the logarithm and the division by a vector's length finite.

    Returns:
        () in nats, the student's dtype; float32 for half precision.

    Reference: Passalis and Tefas 2018, arXiv 1803.10837, equations 3 to 6.
    """
    p_s, p_t = _neighbours(f_s, eps), _neighbours(f_t, eps)
    # With a = p + eps and change = a_t / a_s - 1. The rows of p_s and p_t have the same sum, so p_t - p_s may be
    # subtracted from each term. The terms are then second order in `change`, and do not cancel near the teacher.
    change = (p_t - p_s) / (p_s + eps)
    log_ratio = change.log1p()
    return ((p_s + eps) * ((1 + change) * log_ratio - change) - eps * log_ratio).mean()


def _neighbours(f: Tensor, eps: float) -> Tensor:
    """Row i is image i's probability (B, B) to choose each image of the batch as its neighbour."""
    length = vector_norm(f, dim=1, keepdim=True)
    direction = _direction(f, length)
    # The cosine of f / (length + eps) is c * (1 - t_i) * (1 - t_j), with c that of the directions. Written out, so that
    # 1 + cosine does not cancel for opposite vectors.
    c, t = direction @ direction.mT, eps / (length + eps)
    kernel = (1 + c - c * (t + t.mT - t * t.mT)) / 2
    return kernel / kernel.sum(dim=1, keepdim=True)


def _direction(f: Tensor, length: Tensor) -> Tensor:
    """f / length; a zero vector stays zero.

    The gradient is g -> (g - d (d.g)) / length, d the direction. Automatic differentiation of the division gives the
    same up to rounding errors of g / length, which are large where the kernel is small.
    """
    safe = length.detach().clamp_min(torch.finfo(f.dtype).tiny)
    constant = f.detach() / safe
    return constant + (f - constant * (constant * f).sum(dim=1, keepdim=True)) / safe


@register(
    "PKT",
    CN({"LOSS": CN({"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 30000.0})}),
    ranges={"LOSS.CE_WEIGHT": NOT_NEGATIVE, "LOSS.FEAT_WEIGHT": NOT_NEGATIVE},
)
class PKT(FeatureDistiller):
    """Cross-entropy with the labels and `pkt_loss` between the pooled features."""

    teacher_outputs = ("pooled_feat",)
    compares_images = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN) -> None:
        super().__init__(student, teacher, cfg.PKT)

    def feature_loss(self, feature_student: Features, feature_teacher: Features) -> Tensor:
        return pkt_loss(gather_batch(feature_student["pooled_feat"]), gather_batch(feature_teacher["pooled_feat"]))
