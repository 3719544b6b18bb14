"""Inter-channel correlation: the student's channels resemble each other as the teacher's do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from yacs.config import CfgNode as CN

from ..models.cost import count_parameters
from ..models.parameters import Group
from ..ranges import NOT_NEGATIVE, TEMPERATURE
from ._base import Distiller, Losses, register
from ._feature_maps import MapPairs
from ._precision import full_precision
from .KD import kd_loss

# The least length by which a row is divided.
_LEAST = 1e-12


@full_precision
def ickd_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    """Squared difference of the two networks' correlations between channels, in each image.

        loss = sum_(B, C, C)[ (M_s - M_t)^2 ] / (C B),   M = rows of X X^T, each divided by its L2 norm

    with X the map of an image as (C, HW). A row's norm counts as 1e-12 at least: a channel that is 0 everywhere
    correlates with none, and gets no gradient.

    Args:
        f_s: the student's map (B, C, H_s, W_s), embedded to the teacher's channels.
        f_t: the teacher's (B, C, H_t, W_t); the sizes may differ.

    Returns:
        () in [0, 4], the student's dtype; float32 for half precision.

    Raises:
        ValueError: batches or channels differ.

    Cost: B C^2 HW multiplications for each network.

    Reference: Liu et al. 2021, arXiv 2202.03680, equations 3 and 4.
    """
    if f_s.shape[:2] != f_t.shape[:2]:
        raise ValueError(
            f"ICKD needs as many images and channels of both: the student's {tuple(f_s.shape)}, the teacher's "
            f"{tuple(f_t.shape)}"
        )
    return (_correlations(f_s) - _correlations(f_t)).square().sum() / (f_s.shape[0] * f_s.shape[1])


def _correlations(f: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, C)."""
    x = f.flatten(2)
    products = x @ x.mT
    norm = torch.linalg.vector_norm(products, dim=2, keepdim=True)
    rows = products / norm.clamp_min(_LEAST)
    return rows.where(norm > _LEAST, rows.detach())  # else the gradient of an empty row would be 1e12 times too large


class Embedding(nn.Module):
    """A 1x1 convolution without bias and a BatchNorm, from the student's channels to the teacher's."""

    def __init__(self, s_channels: int, t_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(s_channels, t_channels, kernel_size=1, bias=False)
        self.bn = nn.BatchNorm2d(t_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_student, H, W) -> (B, C_teacher, H, W)."""
        return self.bn(self.conv(x))  # type: ignore[no-any-return]


DEFAULTS = CN({"TEMPERATURE": 4, "LOSS": CN({"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 2.5, "KD_WEIGHT": 0.0})})


RANGES = {
    "TEMPERATURE": TEMPERATURE,
    "LOSS.CE_WEIGHT": NOT_NEGATIVE,
    "LOSS.FEAT_WEIGHT": NOT_NEGATIVE,
    "LOSS.KD_WEIGHT": NOT_NEGATIVE,
}


@register("ICKD", DEFAULTS, ranges=RANGES)
class ICKD(Distiller):
    """Cross-entropy with the labels and `ickd_loss` between the last maps, or those of a pair in DISTILLER.PAIRS.

    The student's map goes through an `Embedding`. With LOSS.KD_WEIGHT, the paper's 1, `kd_loss` is added.

    Args:
        image_size: of the run.

    Raises:
        UserError: there is no pair of maps, or DISTILLER.PAIRS names several.
    """

    needs_run = ("image_size",)
    teacher_outputs = ("logits", "feats")
    soft_labels = True
    label_weight = "LOSS.CE_WEIGHT"
    compares_maps = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN, image_size: int | None = None) -> None:
        super().__init__(student, teacher)
        own = cfg.ICKD
        self.temperature, self.kd_loss_weight = own.TEMPERATURE, own.LOSS.KD_WEIGHT
        self.ce_loss_weight, self.feat_loss_weight = own.LOSS.CE_WEIGHT, own.LOSS.FEAT_WEIGHT
        self.pairs = MapPairs.probed(student, teacher, cfg, image_size, "ICKD")
        self.pairs.keep_one("ICKD")
        logits: Sequence[str] = ("logits",) if self.kd_loss_weight else ()
        self.reads_only("teacher", (*logits, *self.pairs.outputs))
        ((shape_s, shape_t),) = self.pairs.shapes
        self.embed = Embedding(shape_s[1], shape_t[1])

    def get_learnable_parameters(self) -> list[nn.Parameter | Group]:
        return [*super().get_learnable_parameters(), *self.embed.parameters()]

    def get_extra_parameters(self) -> int:
        return count_parameters(self.embed)

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, Losses]:
        logits, features_s = self.student(image)
        logits_teacher, features_t = self.teacher_forward(image)
        (map_s,), (map_t,) = self.pairs(features_s, features_t)
        losses = {
            "loss_ce": self.ce_loss_weight * self.cross_entropy(logits, target, **kwargs),
            "loss_feat": self.feat_loss_weight * ickd_loss(self.embed(map_s), map_t),
        }
        if self.kd_loss_weight:
            losses["loss_kd"] = self.kd_loss_weight * kd_loss(logits, logits_teacher, self.temperature)
        return logits, losses
