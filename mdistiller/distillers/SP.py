"""Similarity-preserving distillation: match the teacher's similarities between the images of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode as CN

from ..distributed.gather import gather_batch
from ..ranges import NOT_NEGATIVE
from ._base import FeatureDistiller, Features, register
from ._feature_maps import MapPairs, align
from ._precision import full_precision


@full_precision
def similarity_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    """Mean squared difference of the two networks' similarities between the samples of a batch.

        loss = |G_s - G_t|_F^2 / B^2,   G = rows of (F F^T), each divided by its L2 norm,   F = f as a (B, D) matrix

    An all-zero sample has similarity 0 to all.

    Args:
        f_s: the student's features (B, ...).
        f_t: the teacher's (B, ...); the dimensions after B may differ from the student's.

    Returns:
        () in [0, 4 / B], the student's dtype; float32 for half precision. 0 for a batch of one.

    Raises:
        ValueError: the batches differ in length.

    Reference: Tung and Mori 2019, arXiv 1907.09682, section 3.
    """
    if len(f_s) != len(f_t):
        raise ValueError(
            f"SP needs batches of the same length; the student's has {len(f_s)} samples, the teacher's {len(f_t)}"
        )
    return F.mse_loss(_similarities(f_s), _similarities(f_t))


def _similarities(f: Tensor) -> Tensor:
    f = f.flatten(1)
    return F.normalize(f @ f.T, dim=1)


def sp_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> Tensor:
    """Sum of `similarity_loss` over the layers: `g_s` and `g_t` hold one tensor of features per layer."""
    return torch.stack([similarity_loss(f_s, f_t) for f_s, f_t in zip(g_s, g_t)]).sum()


@register(
    "SP",
    CN({"LOSS": CN({"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 3000.0})}),
    ranges={"LOSS.CE_WEIGHT": NOT_NEGATIVE, "LOSS.FEAT_WEIGHT": NOT_NEGATIVE},
)
class SP(FeatureDistiller):
    """Cross-entropy with the labels and `sp_loss` on the last feature maps, or on the pairs in DISTILLER.PAIRS.

    Of two maps of different size the larger is average-pooled to the smaller, as in AT, NST and VID.

    Args:
        image_size: of the run.
    """

    needs_run = ("image_size",)
    teacher_outputs = ("feats",)
    compares_images = True
    compares_maps = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN, image_size: int | None = None) -> None:
        super().__init__(student, teacher, cfg.SP)
        self.pairs = MapPairs.probed(student, teacher, cfg, image_size, "SP")
        if not self.pairs.configured:
            self.pairs.keep_deepest(1, "SP", "it compares the last ones")
        self.reads_only("teacher", self.pairs.outputs)

    def feature_loss(self, feature_student: Features, feature_teacher: Features) -> Tensor:
        pairs = [align(f_s, f_t) for f_s, f_t in zip(*self.pairs(feature_student, feature_teacher))]
        g_s, g_t = zip(*((gather_batch(f_s), gather_batch(f_t)) for f_s, f_t in pairs))
        return sp_loss(g_s, g_t)
