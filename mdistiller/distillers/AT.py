"""Attention transfer: the student learns the teacher's spatial attention maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode as CN

from ..ranges import NOT_NEGATIVE, POSITIVE
from ._base import FeatureDistiller, Features, register
from ._feature_maps import MapPairs, align
from ._precision import full_precision


@full_precision
def single_stage_at_loss(f_s: Tensor, f_t: Tensor, p: float) -> Tensor:
    """Mean squared difference of the two networks' normalised attention maps at one stage.

        loss = mean_(B, HW)[ (a_s - a_t)^2 ],   a = A / |A|_2 over HW,   A = mean_C |f|^p

    An all-zero map has a = 0. The gradient is 0 wherever f is 0.

    This is the loss of the authors' released code (p = 2 there), not that of their equation 2. For each image,
    equation 2 adds beta / 2 times the norm |a_s - a_t|, with A summed over the channels. Here the norm is squared and
    divided by the number of positions HW; the weight, LOSS.FEAT_WEIGHT, is not halved. Whether A is a sum or a mean
    makes no difference, as a constant factor cancels in a.

    Args:
        f_s: the student's (B, C_s, H_s, W_s).
        f_t: the teacher's (B, C_t, H_t, W_t); if the sizes differ, the larger is average-pooled to the smaller.
        p: exponent > 0; a larger one gives more weight to the strongest channels.

    Returns:
        () in [0, 4 / HW], the student's dtype; float32 for half precision.

    Raises:
        ValueError: p <= 0.

    Cost: of the maps' size, only the maps themselves are kept for the backward pass.

    Reference: Zagoruyko and Komodakis 2017, arXiv 1612.03928, section 3.1; `at_loss` in their code,
    https://github.com/szagoruyko/attention-transfer.
    """
    if p <= 0:
        raise ValueError(f"AT's exponent must be positive, it is {p}")
    f_s, f_t = align(f_s, f_t)
    return F.mse_loss(attention(f_s, p), attention(f_t, p))


def attention(f: Tensor, p: float) -> Tensor:
    """The normalised attention map (B, HW) of `f` (B, C, H, W)."""
    return F.normalize(_MeanPower.apply(f, p).flatten(1), dim=1)


class _MeanPower(torch.autograd.Function):
    """mean over dim 1 of |f|^p: (B, C, H, W) -> (B, H, W). Plain autograd would store |f|^p and its gradient."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, p: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(f)
        ctx.p = p
        return (f * f if p == 2 else f.abs().pow(p)).sum(dim=1) / f.shape[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (f,) = ctx.saved_tensors
        slope = f if ctx.p == 2 else f.sgn() * f.abs().pow(ctx.p - 1).masked_fill(f == 0, 0)
        return slope * (grad * (ctx.p / f.shape[1])).unsqueeze(1), None


def at_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor], p: float) -> Tensor:
    """Sum of `single_stage_at_loss` over the stages: `g_s` and `g_t` hold one map per stage."""
    return torch.stack([single_stage_at_loss(f_s, f_t, p) for f_s, f_t in zip(g_s, g_t)]).sum()


@register(
    "AT",
    CN({"P": 2, "LOSS": CN({"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 1000.0})}),
    ranges={"P": POSITIVE, "LOSS.CE_WEIGHT": NOT_NEGATIVE, "LOSS.FEAT_WEIGHT": NOT_NEGATIVE},
)
class AT(FeatureDistiller):
    """Cross-entropy with the labels and `at_loss` over the pairs of stages, see `MapPairs`.

    Args:
        image_size: of the run.

    Raises:
        UserError: a network has vectors instead of maps, or every pair of maps has one of 1x1.
    """

    needs_run = ("image_size",)
    teacher_outputs = ("feats",)
    compares_maps = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN, image_size: int | None = None) -> None:
        super().__init__(student, teacher, cfg.AT)
        self.p = cfg.AT.P
        self.pairs = MapPairs.probed(student, teacher, cfg, image_size, "AT")
        self.pairs.require_positions("AT")
        self.reads_only("teacher", self.pairs.outputs)

    def feature_loss(self, feature_student: Features, feature_teacher: Features) -> Tensor:
        return at_loss(*self.pairs(feature_student, feature_teacher), self.p)
