"""Activation boundaries: before training, the student's neurons learn where the teacher's are active."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from yacs.config import CfgNode as CN

from ..models.cost import count_parameters
from ..ranges import NOT_NEGATIVE, POSITIVE, whole
from ._base import Distiller, Losses, register
from ._feature_maps import MapPairs, align, regressor
from ._precision import full_precision
from .facts import image_size_of
from .stages import Stage, parameters_behind

# The released code's scale of the sum over a map's entries.
_SCALE = 3 / 1000


@full_precision
def boundary_loss(f_s: Tensor, f_t: Tensor, margin: float = 1.0) -> Tensor:
    """Squared distance by which the student's neurons miss the side of 0 on which the teacher's are.

        loss = 1/B * sum[ (s + m)^2 if s > -m and t <= 0,   (s - m)^2 if s <= m and t > 0,   else 0 ]

    Args:
        f_s: the student's map (B, C, H, W) before its activation.
        f_t: the teacher's, of the same shape; only its signs count.
        margin: m > 0, how far from the boundary a neuron is to be.

    Returns:
        () >= 0, a sum over C, H and W; the student's dtype, float32 for half precision.

    Raises:
        ValueError: the shapes differ.

    Reference: Heo et al. 2019, arXiv 1811.03233, equation 6.
    """
    if f_s.shape != f_t.shape:
        shapes = f"the student's {tuple(f_s.shape)}, the teacher's {tuple(f_t.shape)}"
        raise ValueError(f"AB needs maps of the same shape: {shapes}")
    short = torch.where(f_t > 0, margin - f_s, margin + f_s).clamp(min=0)
    return torch.linalg.vector_norm(short.flatten(2), dim=2).square().sum() / len(f_s)


def ab_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor], margin: float = 1.0) -> Tensor:
    """Sum of `boundary_loss` over n maps, the last 3/1000 times, each other one half as much as the next.

        loss = 3/1000 * sum_(i = 0..n-1)[ 2^(i - n + 1) * boundary_loss_i ]
    """
    last = len(g_s) - 1
    parts = [2.0 ** (i - last) * boundary_loss(f_s, f_t, margin) for i, (f_s, f_t) in enumerate(zip(g_s, g_t))]
    return _SCALE * torch.stack(parts).sum()


DEFAULTS = CN({"INIT_EPOCHS": 30, "MARGIN": 1.0, "LOSS": CN({"FEAT_WEIGHT": 1.0})})
RANGES = {"INIT_EPOCHS": whole(1), "MARGIN": POSITIVE, "LOSS.FEAT_WEIGHT": NOT_NEGATIVE}


@register("AB", DEFAULTS, ranges=RANGES)
class AB(Distiller):
    """A stage of INIT_EPOCHS epochs with `ab_loss` on pairs of maps before the activation, then cross-entropy alone.

    The stage trains the student up to the deepest of these maps, and connectors from its maps to the teacher's: none
    between maps of one shape, as in the common benchmark's code, else a convolution and BatchNorm, see `regressor`. The
    rest of the student evaluates meanwhile. The stages of the networks are paired by `MapPairs`.

    Args:
        image_size: of the run.
    """

    needs_run = ("image_size",)
    teacher_outputs = ("preact_feats",)
    soft_labels = True
    compares_maps = True
    distills = False  # in training proper

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN, image_size: int | None = None) -> None:
        super().__init__(student, teacher)
        self.init_epochs, self.margin, self.weight = cfg.AB.INIT_EPOCHS, cfg.AB.MARGIN, cfg.AB.LOSS.FEAT_WEIGHT
        self.image_size = image_size or image_size_of(cfg)
        kinds = ("preact_feats", "preact_feats")
        self.pairs = MapPairs.probed(student, teacher, cfg, self.image_size, "AB", kinds=kinds)
        self.reads_only("teacher", self.pairs.outputs)
        # Trained in the stage alone.
        self.connectors = nn.ModuleList(map(_connector, *zip(*self.pairs.shapes))).requires_grad_(False)

    def get_extra_parameters(self) -> int:
        return count_parameters(self.connectors)

    def stages(self) -> tuple[Stage, ...]:
        trunk = parameters_behind(self.student, self.image_size, self.pairs.of_student)
        learnable = [*trunk, *self.connectors.parameters()]
        return (Stage("boundaries", self.init_epochs, learnable, self.boundaries),)

    def boundaries(self, image: Tensor, target: Tensor, **kwargs: Any) -> Losses:
        """The stage's loss."""
        maps_s, maps_t = self.pairs(self.student(image)[1], self.teacher_forward(image)[1])
        embedded = [connector(f_s) for connector, f_s in zip(self.connectors, maps_s)]
        g_s, g_t = zip(*map(align, embedded, maps_t))
        return {"loss_kd": self.weight * ab_loss(g_s, g_t, self.margin)}

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, Losses]:
        logits, _ = self.student(image)
        return logits, {"loss_ce": self.cross_entropy(logits, target, **kwargs)}


def _connector(s_shape: Sequence[int], t_shape: Sequence[int]) -> nn.Module:
    return nn.Identity() if tuple(s_shape) == tuple(t_shape) else regressor(s_shape, t_shape, use_relu=False)
