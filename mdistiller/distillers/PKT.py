"""Probabilistic knowledge transfer: each image is to have the same neighbours for the student as for the teacher."""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor
from torch.linalg import vector_norm
from yacs.config import CfgNode as CN

from ..distributed.gather import gather_batch
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
    return (p_t * ((p_t + eps) / (p_s + eps)).log()).mean()


def _neighbours(f: Tensor, eps: float) -> Tensor:
    """Row i is image i's probability (B, B) to choose each image of the batch as its neighbour."""
    f = f / (vector_norm(f, dim=1, keepdim=True) + eps)
    kernel = (f @ f.mT + 1) / 2
    return kernel / kernel.sum(dim=1, keepdim=True)


@register("PKT", CN({"LOSS": CN({"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 30000.0})}))
class PKT(FeatureDistiller):
    """Cross-entropy with the labels and `pkt_loss` between the pooled features."""

    teacher_outputs = ("pooled_feat",)
    compares_images = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN) -> None:
        super().__init__(student, teacher, cfg.PKT)

    def feature_loss(self, feature_student: Features, feature_teacher: Features) -> Tensor:
        return pkt_loss(gather_batch(feature_student["pooled_feat"]), gather_batch(feature_teacher["pooled_feat"]))
