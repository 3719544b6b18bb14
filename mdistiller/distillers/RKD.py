"""Relational knowledge distillation: the student keeps the distances and angles among the teacher's embeddings."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode as CN

from ._base import Features, register
from ._common import FeatureDistiller, full_precision


@full_precision
def rkd_loss(
    f_s: Tensor,
    f_t: Tensor,
    squared: bool = False,
    eps: float = 1e-12,
    distance_weight: float = 25,
    angle_weight: float = 50,
) -> Tensor:
    """Huber difference of the student's and the teacher's relations among the samples of a batch.

        loss = distance_weight * mean_(i, j) huber(d_s - d_t) + angle_weight * mean_(j, i, k) huber(cos_s - cos_t)

    with d_ij = |e_i - e_j| over its mean, and cos_jik the cosine at e_j between the directions to e_i and to e_k.
    Samples closer than sqrt(eps) count as sqrt(eps) apart and have no direction: their cosines are 0, without gradient.

    Args:
        f_s: the student's embeddings (B, ...), flattened here.
        f_t: the teacher's (B, ...), flattened here; takes no gradient.
        squared: compare squared distances.
        eps: > 0, the least squared distance.

    Returns:
        () >= 0, the student's dtype; float32 for half precision. 0 for a batch of one, which has no relations.

    Raises:
        ValueError: the batches differ in length, or eps <= 0.

    Cost: O(B^2 D + B^3) time and O(B^3) memory, in float64 throughout: an angle is a difference of squared distances.

    Reference: Park et al. 2019, arXiv 1904.05068, equations 6 to 11.
    """
    if len(f_s) != len(f_t):
        raise ValueError(f"RKD compares equal batches; the student's has {len(f_s)} samples, the teacher's {len(f_t)}")
    squares_s = _squared_distances(f_s)
    with torch.no_grad():
        squares_t = _squared_distances(f_t)
        distances_t, angles_t = _relative_distances(squares_t, squared, eps), _cosines(squares_t, eps)
    distance = F.smooth_l1_loss(_relative_distances(squares_s, squared, eps), distances_t)
    angle = F.smooth_l1_loss(_cosines(squares_s, eps), angles_t)
    return (distance_weight * distance + angle_weight * angle).to(f_s.dtype)


@full_precision
def pdist(e: Tensor, squared: bool = False, eps: float = 1e-12) -> Tensor:
    """Euclidean distances between the rows of `e`.

    Args:
        e: (B, D).
        squared: return their squares.
        eps: > 0; off the diagonal no squared distance is smaller, and where it would be there is no gradient.

    Returns:
        (B, B) with zeros on the diagonal, the dtype of `e`; float32 for half precision.

    Raises:
        ValueError: eps <= 0.
    """
    return _distances(_squared_distances(e), squared, eps).to(e.dtype)


def _squared_distances(e: Tensor) -> Tensor:
    """(B, ...) -> (B, B) in float64, from the differences: exactly 0 for equal rows, whatever their length."""
    e = e.flatten(1).double()
    return torch.cdist(e, e, compute_mode="donot_use_mm_for_euclid_dist").square()


def _distances(squares: Tensor, squared: bool, eps: float) -> Tensor:
    if eps <= 0:
        raise ValueError(f"RKD's eps must be positive, it is {eps}: the distance of equal samples has no gradient")
    distances = squares.clamp(min=eps)
    return (distances if squared else distances.sqrt()).masked_fill(_diagonal(squares), 0)


def _relative_distances(squares: Tensor, squared: bool, eps: float) -> Tensor:
    """Distances (B, B) over their mean off the diagonal."""
    distances = _distances(squares, squared, eps)
    pairs = len(squares) * (len(squares) - 1)
    return distances / (distances.sum() / pairs) if pairs else distances


def _cosines(squares: Tensor, eps: float) -> Tensor:
    """(B, B) squared distances -> (B, B, B): at [j, i, k] the cosine at j in the triangle of i, j and k.

    By the law of cosines, (d_ji^2 + d_jk^2 - d_ik^2) / (2 d_ji d_jk): no difference vectors are stored.
    """
    apart = squares > eps
    inverse = torch.where(apart, squares, 1).rsqrt() * apart
    half = squares / 2
    scale = inverse[:, :, None] * inverse[:, None, :]
    return (half[:, :, None] + half[:, None, :] - half) * scale


def _diagonal(square: Tensor) -> Tensor:
    return torch.eye(len(square), dtype=torch.bool, device=square.device)


DEFAULTS = CN(
    {
        "DISTANCE_WEIGHT": 25,
        "ANGLE_WEIGHT": 50,
        "LOSS": CN({"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 1.0}),
        "PDIST": CN({"EPSILON": 1e-12, "SQUARED": False}),
    }
)


@register("RKD", DEFAULTS)
class RKD(FeatureDistiller):
    """Cross-entropy with the labels and `rkd_loss` between the pooled features, which may differ in width."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN) -> None:
        super().__init__(student, teacher, cfg.RKD)
        self.distance_weight = cfg.RKD.DISTANCE_WEIGHT
        self.angle_weight = cfg.RKD.ANGLE_WEIGHT
        self.eps = cfg.RKD.PDIST.EPSILON
        self.squared = cfg.RKD.PDIST.SQUARED

    def feature_loss(self, feature_student: Features, feature_teacher: Features) -> Tensor:
        return rkd_loss(
            feature_student["pooled_feat"],
            feature_teacher["pooled_feat"],
            self.squared,
            self.eps,
            self.distance_weight,
            self.angle_weight,
        )
