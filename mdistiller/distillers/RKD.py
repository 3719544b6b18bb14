"""Relational knowledge distillation: the student keeps the distances and angles between the teacher's embeddings."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from yacs.config import CfgNode as CN

from ..distributed.gather import gather_batch
from ..ranges import NOT_NEGATIVE, POSITIVE
from ._base import FeatureDistiller, Features, register
from ._precision import full_precision

# Elements of the largest temporary tensor, unless one vertex alone has more.
_CHUNK = 2**20


@full_precision
def rkd_loss(
    f_s: Tensor,
    f_t: Tensor,
    squared: bool = False,
    eps: float = 1e-12,
    distance_weight: float = 25,
    angle_weight: float = 50,
) -> Tensor:
    """Huber loss between the student's and the teacher's distances and angles in a batch.

        loss = distance_weight * mean_(i, j) huber(d_s - d_t) + angle_weight * mean_(j, i, k) huber(cos_s - cos_t)

    with d_ij = |e_i - e_j| over its mean, and cos_jik the cosine at e_j between the directions to e_i and to e_k.
    Samples closer than sqrt(eps) count as sqrt(eps) apart and have no direction: their cosines are 0, without gradient.

    Args:
        f_s: the student's embeddings (B, ...), flattened here.
        f_t: the teacher's (B, ...), flattened here; gets no gradient.
        squared: compare squared distances.
        eps: > 0, lower bound of a squared distance.

    Returns:
        () >= 0, the student's dtype; float32 for half precision. 0 for a batch of one, which has no pairs.

    Raises:
        ValueError: the batches differ in length, or eps <= 0.

    Cost: O(B^2 D + B^3) time and O(B^2) memory, plus temporaries of 8 MiB or B^2 numbers. In float64 throughout, as
    angles are computed from differences of squared distances.

    Reference: Park et al. 2019, arXiv 1904.05068, section 3.2.
    """
    if len(f_s) != len(f_t):
        raise ValueError(
            f"RKD needs batches of the same length; the student's has {len(f_s)} samples, the teacher's {len(f_t)}"
        )
    squares_s, squares_t = _squared_distances(f_s), _squared_distances(f_t.detach())
    distance = F.smooth_l1_loss(_relative(squares_s, squared, eps), _relative(squares_t, squared, eps))
    angle = _AngleLoss.apply(squares_s, squares_t, eps)
    return (distance_weight * distance + angle_weight * angle).to(f_s.dtype)


@full_precision
def pdist(e: Tensor, squared: bool = False, eps: float = 1e-12) -> Tensor:
    """Euclidean distances between the rows of `e`.

    Args:
        e: (B, D).
        squared: return their squares.
        eps: > 0; smaller squared distances off the diagonal are clamped to it and get no gradient.

    Returns:
        (B, B) with zeros on the diagonal, the dtype of `e`; float32 for half precision.

    Raises:
        ValueError: eps <= 0.
    """
    return _distances(_squared_distances(e), squared, eps).to(e.dtype)


def _squared_distances(e: Tensor) -> Tensor:
    """(B, ...) -> (B, B) in float64, from the differences: exactly 0 for equal rows of any norm."""
    return _SquaredDistances.apply(e.flatten(1).double())


class _SquaredDistances(torch.autograd.Function):
    """|e_i - e_j|^2, each pair once; the gradient 2 sum_j (g_ij + g_ji) (e_i - e_j) is one matrix product."""

    @staticmethod
    def forward(ctx: Any, e: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(e)
        upper = torch.triu_indices(len(e), len(e), offset=1, device=e.device).unbind()
        squares = e.new_zeros(len(e), len(e))
        squares[upper] = torch.pdist(e).square()
        return squares + squares.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (e,) = ctx.saved_tensors
        both = grad + grad.T
        return 2 * (both.sum(dim=1, keepdim=True) * e - both @ e)


def _distances(squares: Tensor, squared: bool, eps: float) -> Tensor:
    if eps <= 0:
        raise ValueError(f"RKD's eps must be positive, it is {eps}: the distance of equal samples has no gradient")
    distances = squares.clamp(min=eps)
    diagonal = torch.eye(len(squares), dtype=torch.bool, device=squares.device)
    return (distances if squared else distances.sqrt()).masked_fill(diagonal, 0)


def _relative(squares: Tensor, squared: bool, eps: float) -> Tensor:
    """Distances (B, B), divided by their mean off the diagonal."""
    distances = _distances(squares, squared, eps)
    pairs = len(squares) * (len(squares) - 1)
    return distances / (distances.sum() / pairs) if pairs else distances


class _AngleLoss(torch.autograd.Function):
    """mean_(j, i, k) huber(cos_s - cos_t) from squared distances (B, B), for a chunk of vertices j at a time.

    By the law of cosines, with q = d^2 / 2 and u = 1 / d (0 where d^2 <= eps),

        cos_jik = (q_ji + q_jk - q_ik) u_ji u_jk

    so that no difference vectors are needed. The slope g of the loss in each cosine exists only while its chunk is
    processed, so the forward pass also computes the slopes in q (d u / d q = -u^3):

        slope_ji = 2 u_ji sum_k g_jik (u_jk - u_ji cos_jik),   slope_ik = -sum_j g_jik u_ji u_jk
    """

    @staticmethod
    def forward(ctx: Any, squares_s: Tensor, squares_t: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        halves_s, halves_t = squares_s / 2, squares_t / 2
        inverses_s, inverses_t = _inverse_distances(squares_s, eps), _inverse_distances(squares_t, eps)
        loss, slope = squares_s.new_zeros(()), torch.zeros_like(squares_s)
        rows = max(1, _CHUNK // squares_s.numel())
        for start in range(0, len(squares_s), rows):
            at = slice(start, start + rows)
            cos = _cosines(halves_s, inverses_s, at)
            diff = cos - _cosines(halves_t, inverses_t, at)
            g = diff.clamp(-1, 1)
            loss += torch.dot(g.flatten(), diff.sub_(g, alpha=0.5).flatten())
            u = inverses_s[at]
            slope[at] += 2 * u * ((g @ u[:, :, None]).squeeze(2) - u * cos.mul_(g).sum(dim=2))
            slope -= g.mul_(u[:, :, None]).mul_(u[:, None, :]).sum(dim=0)
        ctx.save_for_backward(slope)
        return loss / len(slope) ** 3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (slope,) = ctx.saved_tensors
        return slope * (grad / 2 / len(slope) ** 3), None, None


def _cosines(halves: Tensor, inverses: Tensor, at: slice) -> Tensor:
    """(rows, B, B): the cosines at the vertices `at`."""
    sides = (halves[at, :, None] + halves[at, None, :]).sub_(halves)
    return sides.mul_(inverses[at, :, None]).mul_(inverses[at, None, :])


def _inverse_distances(squares: Tensor, eps: float) -> Tensor:
    apart = squares > eps
    return torch.where(apart, squares, 1).rsqrt() * apart


DEFAULTS = CN(
    {
        "DISTANCE_WEIGHT": 25,
        "ANGLE_WEIGHT": 50,
        "LOSS": CN({"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 1.0}),
        "PDIST": CN({"EPSILON": 1e-12, "SQUARED": False}),
    }
)


RANGES = {
    "DISTANCE_WEIGHT": NOT_NEGATIVE,
    "ANGLE_WEIGHT": NOT_NEGATIVE,
    "LOSS.CE_WEIGHT": NOT_NEGATIVE,
    "LOSS.FEAT_WEIGHT": NOT_NEGATIVE,
    "PDIST.EPSILON": POSITIVE,
}


@register("RKD", DEFAULTS, ranges=RANGES)
class RKD(FeatureDistiller):
    """Cross-entropy with the labels and `rkd_loss` between the pooled features, which may differ in width."""

    teacher_outputs = ("pooled_feat",)
    compares_images = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN) -> None:
        super().__init__(student, teacher, cfg.RKD)
        self.distance_weight = cfg.RKD.DISTANCE_WEIGHT
        self.angle_weight = cfg.RKD.ANGLE_WEIGHT
        self.eps = cfg.RKD.PDIST.EPSILON
        self.squared = cfg.RKD.PDIST.SQUARED

    def feature_loss(self, feature_student: Features, feature_teacher: Features) -> Tensor:
        return rkd_loss(
            gather_batch(feature_student["pooled_feat"]),
            gather_batch(feature_teacher["pooled_feat"]),
            self.squared,
            self.eps,
            self.distance_weight,
            self.angle_weight,
        )
