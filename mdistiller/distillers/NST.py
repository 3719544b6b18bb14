"""Neuron selectivity transfer: match the distribution of the student's channels to that of the teacher's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode as CN

from ..ranges import NOT_NEGATIVE
from ._base import FeatureDistiller, Features, register
from ._feature_maps import MapPairs, align
from ._precision import full_precision

EPS = 1e-12  # lower bound of a channel's norm


@full_precision
def single_stage_nst_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    """Squared maximum mean discrepancy between the channels of two maps, with the kernel k(a, b) = (a . b)^2.

        loss = mean_B[ mean_(C_s, C_s) k(s, s') - 2 mean_(C_s, C_t) k(s, t) + mean_(C_t, C_t) k(t, t') ]

    where s and t are channels (HW vectors) divided by their L2 norm; an all-zero channel stays 0.

    A sum of k over all pairs is the squared norm of a matrix product, and with the Gram matrices over positions
    G = F^T F / C (HW x HW) the whole loss is mean_B |G_s - G_t|^2. The cheaper form is computed, over channels or over
    positions; neither holds HW numbers for each pair of channels. Over channels, the norms come from the products'
    diagonals.

    Args:
        f_s: the student's (B, C_s, H_s, W_s).
        f_t: the teacher's (B, C_t, H_t, W_t); if the sizes differ, the larger is average-pooled to the smaller.

    Returns:
        () >= 0 up to rounding, the student's dtype; float32 for half precision.

    Cost: B HW C min(3 C, 2 HW) multiplications, memory for B min(C, HW)^2 numbers per product.

    Reference: Huang and Wang 2017, arXiv 1707.01219, equations 3 and 6.
    """
    f_s, f_t = (f.flatten(2) for f in align(f_s, f_t))
    (batch, c_s, positions), c_t = f_s.shape, f_t.shape[1]
    if positions * (c_s + c_t) < c_s**2 + c_s * c_t + c_t**2:
        return (_gram(f_s) / c_s - _gram(f_t) / c_t).square().sum() / batch
    inner_s, inner_t = f_s @ f_s.mT, f_t @ f_t.mT
    scale_s, scale_t = (inner.diagonal(dim1=1, dim2=2).clamp_min(EPS**2).rsqrt() for inner in (inner_s, inner_t))
    return (
        _mean_square(inner_s, scale_s, scale_s)
        - 2 * _mean_square(f_s @ f_t.mT, scale_s, scale_t)
        + _mean_square(inner_t, scale_t, scale_t)
    )


def _gram(f: Tensor) -> Tensor:
    """Gram matrices over positions of the normalised channels: (B, C, HW) -> (B, HW, HW)."""
    f = F.normalize(f, dim=2, eps=EPS)
    return f.mT @ f


def _mean_square(inner: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    """mean of k over the batch and all pairs, from (B, C_a, C_b) products of channels and each channel's 1 / norm."""
    return (inner * scale_a.unsqueeze(2) * scale_b.unsqueeze(1)).square().mean()


def nst_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> Tensor:
    """Sum of `single_stage_nst_loss` over the stages: `g_s` and `g_t` hold one map per stage."""
    return torch.stack([single_stage_nst_loss(f_s, f_t) for f_s, f_t in zip(g_s, g_t)]).sum()


@register(
    "NST",
    CN({"LOSS": CN({"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 50.0})}),
    ranges={"LOSS.CE_WEIGHT": NOT_NEGATIVE, "LOSS.FEAT_WEIGHT": NOT_NEGATIVE},
)
class NST(FeatureDistiller):
    """Cross-entropy with the labels and `nst_loss` over the pairs of stages, see `MapPairs`.

    Args:
        image_size: of the run.

    Raises:
        UserError: a network has vectors instead of maps, or every pair of maps has one of 1x1.
    """

    needs_run = ("image_size",)
    teacher_outputs = ("feats",)
    compares_maps = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN, image_size: int | None = None) -> None:
        super().__init__(student, teacher, cfg.NST)
        self.pairs = MapPairs.probed(student, teacher, cfg, image_size, "NST")
        self.pairs.require_positions("NST")
        self.reads_only("teacher", self.pairs.outputs)

    def feature_loss(self, feature_student: Features, feature_teacher: Features) -> Tensor:
        return nst_loss(*self.pairs(feature_student, feature_teacher))
