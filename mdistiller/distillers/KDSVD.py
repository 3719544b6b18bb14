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

from ..errors import UserError
from ..ranges import NOT_NEGATIVE, whole
from ..registry import Registry, unknown_name
from ._base import FeatureDistiller, Features, register
from ._feature_maps import MapPairs, align
from ._precision import full_precision

# KDSVD.AXIS -> a map (B, C, H, W) as a matrix, whose right singular vectors are the map's directions.
_MATRICES = Registry(
    "KDSVD.AXIS",
    {
        "columns": lambda f: f.flatten(1, 2),  # (B, C H, W), as in the original
        "channels": lambda f: f.flatten(2).mT,  # (B, HW, C), as in the paper's code
    },
)
_TOO_MANY = "KDSVD.K {k} is more than the {smallest} directions of the smallest map; set at most that"


def kdsvd_loss(
    g_s: Sequence[Tensor], g_t: Sequence[Tensor], k: int, dtype: torch.dtype | None = None, axis: str = "columns"
) -> Tensor:
    """Squared difference between how student's and teacher's directions change from one stage to the next.

        loss = sum_i sum_(a, b, j)[ (R_s[a, b, j] - R_t[a, b, j])^2 ] / B
        R[a, b, j] = exp( -(v_i[a, j] - v_(i-1)[b, j])^2 / 8 )

    where i runs over the stages but the first, and v_i (W, k) or (C, k) holds the map's k leading right singular
    vectors, see `directions`. Each is multiplied by the teacher's singular value (divided by the norm of all k). For
    each of the teacher's vectors, the student's is the one of its k + 3 leading ones with the largest |cosine|, its
    sign flipped if the cosine is negative.

    Args:
        g_s: the student's maps (B, C, H, W), one per stage, two or more.
        g_t: the teacher's, of the same W ("columns") or the same C ("channels"); they get no gradient.
        k: number of directions, at least 1; a map has at most W or C.
        dtype: the directions are rounded to it; by default the maps' own, or float32 for half precision.
        axis: "columns", as in the original, or "channels", as in the paper and its authors' code.

    Returns:
        () >= 0, of that dtype; NaN if a map is not finite.

    Raises:
        ValueError: k < 1, fewer than two stages, or an unknown axis.

    Cost: R has B W W' k elements for two stages of widths W and W', with "channels" B C C' k.

    Reference: Lee et al. 2018, arXiv 1807.06819, section 3.
    """
    if k < 1:
        raise ValueError(f"KDSVD.K must be at least 1, it is {k}")
    if len(g_s) < 2:
        raise ValueError(f"KDSVD needs two stages or more, to compare each with the one before; there are {len(g_s)}")
    stages = [_aligned_directions(f_s, f_t, k, dtype, axis) for f_s, f_t in zip(g_s, g_t)]
    found = {vectors.shape[-1] for stage in stages for vectors in stage}
    if len(found) > 1:
        raise UserError(_TOO_MANY.format(k=k, smallest=min(found)))
    changes = [(_change(s0, s1) - _change(t0, t1)).square().sum() for (s0, t0), (s1, t1) in pairwise(stages)]
    return torch.stack(changes).sum() / len(g_s[0])


def _aligned_directions(
    f_s: Tensor, f_t: Tensor, k: int, dtype: torch.dtype | None, axis: str
) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's scaled directions (B, W, k) or (B, C, k) at one stage."""
    with torch.no_grad():
        v_t, sigma = directions(f_t, k, axis)
        scale = F.normalize(sigma, dim=1).unsqueeze(1)
    v_s, _ = directions(f_s, k + 3, axis)
    cosine = v_s.detach().mT @ v_t
    best = cosine.abs().argmax(dim=1, keepdim=True)  # (B, 1, k)
    v_s = v_s.gather(2, best.expand(-1, v_s.shape[1], -1)) * cosine.gather(1, best).sign()
    return (v_s * scale).to(dtype or v_s.dtype), (v_t * scale).to(dtype or v_t.dtype)


def _change(before: Tensor, after: Tensor) -> Tensor:
    """R of `kdsvd_loss`: (B, W, k), (B, W', k) -> (B, W', W, k), in (0, 1]."""
    return torch.exp((after.unsqueeze(2) - before.unsqueeze(1)).square() / -8)


@full_precision
def directions(f: Tensor, n: int, axis: str = "columns") -> tuple[Tensor, Tensor]:
    """The n leading right singular vectors and singular values (B, n) of each map as a matrix, by `axis`:

        "columns": the (C H, W) matrix, vectors (B, W, n);   "channels": the (HW, C) matrix, vectors (B, C, n)

    A decomposition leaves a vector's sign open; it is chosen so that the entries sum to at least 0. A direction that
    the map does not have (singular value 0) is a zero vector. Directions of equal singular values are arbitrary, so
    the gradient between them is set to 0. Both results are NaN for a map that is not finite, or whose squares overflow.

    Raises:
        UnknownNameError: an unknown axis.

    Cost: the Gram matrix over the matrix's shorter side, M x M, and its eigenvectors; singular values below
    sqrt(M eps) of the largest count as 0.
    """
    return _Directions.apply(_MATRICES[axis](f), n)


class _Directions(torch.autograd.Function):
    """`directions` of matrices (B, N, W). Their singular values are not differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        values, vectors = _eigenvectors(x, n)
        present = values > _tolerance(values, x.dtype)
        sign = torch.where(vectors.sum(dim=1, keepdim=True) < 0, -1, 1)
        vectors = vectors * sign * present.unsqueeze(1)
        ctx.save_for_backward(x, values, vectors, present)
        sigma = (values * present).sqrt()[:, :n].to(x.dtype)
        ctx.mark_non_differentiable(sigma)
        return vectors[:, :, :n].to(x.dtype), sigma

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """First-order perturbation: a vector turns towards another by <change> / <gap of their eigenvalues>.

        `rest` turns it towards the directions that the matrix does not have, whose eigenvalue is 0.
        """
        x, values, vectors, present = ctx.saved_tensors
        n, grad = grad.shape[2], grad.double()
        lead, absent = values[:, None, :n], ~present[:, None, :n]
        gap = lead - values[:, :, None]
        arbitrary = (gap.abs() <= _tolerance(values, x.dtype).unsqueeze(1)) | absent
        parts = vectors.mT @ grad
        rest = ((grad - vectors @ parts) / lead.masked_fill(absent, 1)).masked_fill(absent, 0)
        turn = vectors @ (parts / gap.masked_fill(arbitrary, 1)).masked_fill(arbitrary, 0) + rest
        vectors = vectors[:, :, :n]
        if x.shape[1] < x.shape[2]:  # a W x W matrix would be larger than x
            turn, vectors = turn.to(x.dtype), vectors.to(x.dtype)
            return x @ turn @ vectors.mT + x @ vectors @ turn.mT, None
        turn = turn @ vectors.mT
        return x @ (turn + turn.mT).to(x.dtype), None


def _eigenvectors(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues (B, M), largest first, and eigenvectors (B, W, M) of the Gram matrices x^T x of x (B, N, W).

    They are NaN where x^T x is not finite. M = W, but N if N < W: then the smaller x x^T is decomposed, which has the
    same eigenvalues except for zeros. If that leaves fewer than n, zeros are appended, up to min(n, W).
    """
    wide = x.shape[1] < x.shape[2]
    gram = (x @ x.mT if wide else x.mT @ x).double()
    # eigh raises an error for a matrix that is not finite. All is masked, not selected: a selection would make the host
    # wait for the device.
    finite = gram.isfinite().all(dim=2, keepdim=True).all(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(gram.masked_fill(~finite, 0))
    values = values.masked_fill(~finite.squeeze(2), torch.nan).flip(1)
    vectors = vectors.masked_fill(~finite, torch.nan).flip(2)
    if wide:
        zeros = 0, max(0, min(n, x.shape[2]) - x.shape[1])
        vectors = F.normalize(x.double().mT @ vectors, dim=1)
        values, vectors = F.pad(values, zeros), F.pad(vectors, zeros)
    return values, vectors


def _tolerance(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The rounding error (B, 1) of eigenvalues (B, W), largest first, of a Gram matrix formed in `dtype`."""
    return values.shape[1] * torch.finfo(dtype).eps * values[:, :1]


def _require_equal_channels(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
    for shape_s, shape_t in pairs:
        if shape_s[1] != shape_t[1]:
            raise UserError(
                f"KDSVD.AXIS channels needs maps with the same number of channels: the student's {tuple(shape_s)}, "
                f"the teacher's {tuple(shape_t)}; KDSVD.AXIS columns takes any number"
            )


def _require_directions(k: int, axis: str, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
    """Refuse more directions than a map has: as many as its columns, or as its channels."""
    dim = -1 if axis == "columns" else 1
    smallest = min(min(shape_s[dim], shape_t[dim]) for shape_s, shape_t in pairs)
    if k > smallest:
        raise UserError(_TOO_MANY.format(k=k, smallest=smallest))


@register(
    "KDSVD",
    CN({"K": 1, "AXIS": "columns", "LOSS": CN({"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 1.0})}),
    ranges={"K": whole(1), "LOSS.CE_WEIGHT": NOT_NEGATIVE, "LOSS.FEAT_WEIGHT": NOT_NEGATIVE},
)
class KDSVD(FeatureDistiller):
    """Cross-entropy with the labels and `kdsvd_loss` over the pairs of stages, see `MapPairs`.

    For columns, the larger of two maps is average-pooled to the smaller, as in AT, NST, VID and SP.

    KDSVD.AXIS says what the directions are taken over: the maps' "columns" as in the original, or their "channels" as
    in the paper. They are float32 as in the original, even in a float64 run.

    Args:
        image_size: of the run.

    Raises:
        UserError: there are fewer than two pairs, or a network has vectors instead of maps; for "channels", the maps
            of a pair differ in their number of channels; a map has fewer than K directions, or all are 1x1.
        UserError: AXIS is unknown.
    """

    needs_run = ("image_size",)
    teacher_outputs = ("feats",)
    compares_maps = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN, image_size: int | None = None) -> None:
        super().__init__(student, teacher, cfg.KDSVD)
        self.k, self.axis = cfg.KDSVD.K, cfg.KDSVD.AXIS
        if self.axis not in _MATRICES:
            raise unknown_name("KDSVD.AXIS", self.axis, _MATRICES)
        self.pairs = MapPairs.probed(student, teacher, cfg, image_size, "KDSVD", least=2)
        self.reads_only("teacher", self.pairs.outputs)
        if self.axis == "channels":
            _require_equal_channels(self.pairs.shapes)
        else:
            self.pairs.require_positions("KDSVD")
        _require_directions(self.k, self.axis, self.pairs.shapes)

    def feature_loss(self, feature_student: Features, feature_teacher: Features) -> Tensor:
        pairs: Any = zip(*self.pairs(feature_student, feature_teacher))
        if self.axis == "columns":
            pairs = (align(f_s, f_t) for f_s, f_t in pairs)
        g_s, g_t = zip(*pairs)
        return kdsvd_loss(g_s, g_t, self.k, torch.float32, self.axis)
