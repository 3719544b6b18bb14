"""Flow of the solution procedure: before training, the student's maps follow each other as the teacher's do."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode as CN

from ..console import network_name
from ..errors import UserError
from ..ranges import NOT_NEGATIVE, whole
from ._base import Distiller, Losses, register
from ._feature_maps import MapPairs, align
from ._precision import full_precision
from .facts import image_size_of
from .stages import Stage, parameters_behind


@full_precision
def flow(lower: Tensor, upper: Tensor) -> Tensor:
    """The FSP matrix of two maps of one network: the mean over positions of products of their channels.

        G[c, d] = mean_HW[ a_c * b_d ]

    Args:
        lower, upper: (B, C, H, W) and (B, D, H', W'); the larger map is average-pooled to the smaller.

    Returns:
        (B, C, D), float32 for half precision.

    Reference: Yim et al., A Gift from Knowledge Distillation, CVPR 2017, equation 1.
    """
    a, b = (f.flatten(2) for f in align(lower, upper))
    return a @ b.mT / a.shape[2]


def fsp_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of the networks' `flow` from each map to the next, summed over these steps.

    Args:
        g_s, g_t: the maps of student and teacher, from shallow to deep, two or more; map i has equal channels in both.

    Returns:
        () >= 0, the student's dtype; float32 for half precision.

    Raises:
        ValueError: fewer than two maps, or channels differ.

    Cost: B C D HW multiplications for each step and network.
    """
    channels = [[f.shape[1] for f in maps] for maps in (g_s, g_t)]
    if len(g_s) < 2 or channels[0] != channels[1]:
        raise ValueError(
            f"FSP needs two maps or more of the same channels: the student's {channels[0]}, the teacher's {channels[1]}"
        )
    steps = zip(itertools.pairwise(g_s), itertools.pairwise(g_t))
    return torch.stack([F.mse_loss(flow(*own), flow(*other)) for own, other in steps]).sum()


DEFAULTS = CN({"INIT_EPOCHS": 30, "LOSS": CN({"FEAT_WEIGHT": 50.0})})
RANGES = {"INIT_EPOCHS": whole(1), "LOSS.FEAT_WEIGHT": NOT_NEGATIVE}


@register("FSP", DEFAULTS, ranges=RANGES)
class FSP(Distiller):
    """A stage of INIT_EPOCHS epochs with `fsp_loss` between all maps, the stem's too, then cross-entropy alone.

    The stage trains the student up to the deepest map. The maps are paired from the deepest up, or as DISTILLER.PAIRS
    says.

    Args:
        image_size: of the run.

    Raises:
        UserError: fewer than two pairs of maps, or the two of a pair differ in channels.
    """

    needs_run = ("image_size",)
    teacher_outputs = ("feats",)
    soft_labels = True
    compares_maps = True
    distills = False  # in training proper

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN, image_size: int | None = None) -> None:
        super().__init__(student, teacher)
        self.init_epochs, self.weight = cfg.FSP.INIT_EPOCHS, cfg.FSP.LOSS.FEAT_WEIGHT
        self.image_size = image_size or image_size_of(cfg)
        self.pairs = MapPairs.probed(student, teacher, cfg, self.image_size, "FSP", least=2, stem=True)
        channels_s, channels_t = ([shape[1] for shape in shapes] for shapes in zip(*self.pairs.shapes))
        if channels_s != channels_t:
            raise UserError(
                f"FSP needs maps of as many channels in both networks: the student {network_name(student)} has "
                f"{channels_s}, the teacher {network_name(teacher)} {channels_t}; choose a network of the same widths, "
                "such as resnet20 for resnet56, or maps of equal channels by DISTILLER.PAIRS"
            )
        self.reads_only("teacher", self.pairs.outputs)

    def stages(self) -> tuple[Stage, ...]:
        trunk = parameters_behind(self.student, self.image_size, self.pairs.of_student)
        return (Stage("flow", self.init_epochs, trunk, self.flows),)

    def flows(self, image: Tensor, target: Tensor, **kwargs: Any) -> Losses:
        """The stage's loss."""
        maps = self.pairs(self.student(image)[1], self.teacher_forward(image)[1])
        return {"loss_kd": self.weight * fsp_loss(*maps)}

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, Losses]:
        logits, _ = self.student(image)
        return logits, {"loss_ce": self.cross_entropy(logits, target, **kwargs)}
