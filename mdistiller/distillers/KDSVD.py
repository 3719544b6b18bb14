"""Distillation by singular vectors: match how the feature maps' leading directions change from stage to stage."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode as CN

from ._base import FeatureDistiller, Features, register
from ._feature_maps import get_stage_shapes, pair_stages, require_paired_maps
from ._precision import full_precision


def kdsvd_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor], k: int, dtype: torch.dtype | None = None) -> Tensor:
    """Squared difference between how student's and teacher's directions change from one stage to the next.

        loss = sum_i sum_(a, b, j)[ (R_s[a, b, j] - R_t[a, b, j])^2 ] / B
        R[a, b, j] = exp( -(v_i[a, j] - v_(i-1)[b, j])^2 / 8 )

    where i runs over the stages but the first, and v_i (W, k) holds the map's k leading right singular vectors, see
    `directions`. Each is multiplied by the teacher's singular value (divided by the norm of all k). For each of the
    teacher's vectors, the student's is the one of its k + 3 leading ones with the largest |cosine|, its sign flipped if
    the cosine is negative.

    Args:
        g_s: the student's maps (B, C, H, W), one per stage, two or more.
        g_t: the teacher's, of the same H and W and any C; they get no gradient.
        k: number of directions, at least 1; a map has at most W.
        dtype: the directions are rounded to it; by default the maps' own, or float32 for half precision.

    Returns:
        () >= 0, of that dtype.

    Raises:
        ValueError: k < 1, or fewer than two stages.

    Reference: Lee et al. 2018, arXiv 1807.06819, section 3; directions over columns as in the original's code.
    """
    if k < 1:
        raise ValueError(f"KDSVD.K must be at least 1, it is {k}")
    if len(g_s) < 2:
        raise ValueError(f"KDSVD needs two stages or more, to compare each with the one before; there are {len(g_s)}")
    stages = [_aligned_directions(f_s, f_t, k, dtype) for f_s, f_t in zip(g_s, g_t)]
    changes = [(_change(s0, s1) - _change(t0, t1)).square().sum() for (s0, t0), (s1, t1) in pairwise(stages)]
    return torch.stack(changes).sum() / len(g_s[0])


def _aligned_directions(f_s: Tensor, f_t: Tensor, k: int, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's scaled directions (B, W, k) at one stage."""
    with torch.no_grad():
        v_t, sigma = directions(f_t, k)
        scale = F.normalize(sigma, dim=1).unsqueeze(1)
    v_s, _ = directions(f_s, k + 3)
    cosine = v_s.detach().mT @ v_t
    best = cosine.abs().argmax(dim=1, keepdim=True)  # (B, 1, k)
    v_s = v_s.gather(2, best.expand(-1, v_s.shape[1], -1)) * cosine.gather(1, best).sign()
    return (v_s * scale).to(dtype or v_s.dtype), (v_t * scale).to(dtype or v_t.dtype)


def _change(before: Tensor, after: Tensor) -> Tensor:
    """R of `kdsvd_loss`: (B, W, k), (B, W', k) -> (B, W', W, k), in (0, 1]."""
    return torch.exp((after.unsqueeze(2) - before.unsqueeze(1)).square() / -8)


@full_precision
def directions(f: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n leading right singular vectors (B, W, n) and singular values (B, n) of each map as a (C H, W) matrix.

    A decomposition leaves a vector's sign open; it is chosen so that the entries sum to at least 0. A direction that
    the map does not have (singular value 0) is a zero vector. Directions of equal singular values are arbitrary, so
    the gradient between them is set to 0.

    Cost: a (W, W) Gram matrix and its eigenvectors; singular values below sqrt(W eps) of the largest count as 0.
    """
    return _Directions.apply(f.flatten(1, 2), n)


class _Directions(torch.autograd.Function):
    """`directions` of matrices (B, N, W). Their singular values are not differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        values, vectors = torch.linalg.eigh((x.mT @ x).double())
        values, vectors = values.flip(1), vectors.flip(2)
        present = values > _tolerance(values, x.dtype)
        sign = torch.where(vectors.sum(dim=1, keepdim=True) < 0, -1, 1)
        vectors = vectors * sign
        ctx.save_for_backward(x, values, vectors, present)
        sigma = (values * present).sqrt()[:, :n].to(x.dtype)
        ctx.mark_non_differentiable(sigma)
        return (vectors * present.unsqueeze(1))[:, :, :n].to(x.dtype), sigma

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """First-order perturbation: a vector turns towards another by <change> / <gap of their eigenvalues>."""
        x, values, vectors, present = ctx.saved_tensors
        n = grad.shape[2]
        gap = values[:, None, :n] - values[:, :, None]
        arbitrary = (gap.abs() <= _tolerance(values, x.dtype).unsqueeze(1)) | ~present[:, None, :n]
        turn = (vectors.mT @ grad.double() / gap.masked_fill(arbitrary, 1)).masked_fill(arbitrary, 0)
        turn = vectors @ turn @ vectors[:, :, :n].mT
        return x @ (turn + turn.mT).to(x.dtype), None


def _tolerance(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The rounding error (B, 1) of eigenvalues (B, W), largest first, of a Gram matrix formed in `dtype`."""
    return values.shape[1] * torch.finfo(dtype).eps * values[:, :1]


@register("KDSVD", CN({"K": 1, "LOSS": CN({"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 1.0})}))
class KDSVD(FeatureDistiller):
    """Cross-entropy with the labels and `kdsvd_loss` over the stages after the stem.

    The directions are float32 as in the original, even in a float64 run.

    Raises:
        ValueError: the networks differ in their number of stages or their maps' sizes, or have vectors instead of maps.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN) -> None:
        super().__init__(student, teacher, cfg.KDSVD)
        self.k = cfg.KDSVD.K
        require_paired_maps(*get_stage_shapes(student, teacher), "KDSVD", same_size=True)

    def feature_loss(self, feature_student: Features, feature_teacher: Features) -> Tensor:
        g_s, g_t = zip(*pair_stages(feature_student["feats"], feature_teacher["feats"]))
        return kdsvd_loss(g_s, g_t, self.k, torch.float32)
