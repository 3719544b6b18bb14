"""The distillation losses by KD.TYPE: DKD on class logits, ReviewKD on feature maps, or both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes
from torch import Tensor

from mdistiller.distillers.DKD import dkd_loss
from mdistiller.distillers.ReviewKD import build_abfs, hcl_loss, review
from mdistiller.errors import UserError
from mdistiller.registry import Registry

Maps = dict[str, Tensor]
Shapes = dict[str, ShapeSpec]


@dataclass
class Seen:
    """What the distillation losses read of a batch.

    Attributes:
        maps_student: p2..p6, each (B, C, H, W).
        maps_teacher: the teacher's, of the same names.
        boxes: the student's sampled proposals, one entry per image, R in all.
        classes: (R,) int64, the true class of each proposal; the last class is the background.
        logits_student: (R, classes + 1).
        heads_teacher: the teacher's ROI heads.
    """

    maps_student: Maps
    maps_teacher: Maps
    boxes: list[Boxes]
    classes: Tensor
    logits_student: Tensor
    heads_teacher: StandardROIHeads


@torch.no_grad()
def proposal_logits(heads: StandardROIHeads, maps: Maps, boxes: Sequence[Boxes]) -> Tensor:
    """The class logits (R, classes + 1) of `heads` for `boxes` (one entry per image) on the feature `maps`."""
    pooled = heads.box_pooler([maps[name] for name in heads.box_in_features], list(boxes))
    logits, _ = heads.box_predictor(heads.box_head(pooled))
    return logits


class DKDLoss(nn.Module):
    """`dkd_loss` between student and teacher logits of the student's sampled proposals; the background is a class.

    Raises:
        UserError: KD.DKD.T is not above 0 and finite; a classifier whose background logit is not trained.

    Reference: Zhao et al. 2022, arXiv 2203.08679, section 4.
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        if not 0 < cfg.KD.DKD.T < math.inf:
            raise UserError(f"KD.DKD.T is {cfg.KD.DKD.T}; the temperature must be above 0 and finite")
        for whose, model in (("MODEL", cfg.MODEL), ("TEACHER.MODEL", cfg.TEACHER.MODEL)):
            if model.ROI_BOX_HEAD.USE_SIGMOID_CE:
                raise UserError(
                    f"{whose}.ROI_BOX_HEAD.USE_SIGMOID_CE is True, which trains no logit for the background, but DKD "
                    "compares it; set it to False, or KD.TYPE to ReviewKD"
                )
        self.alpha, self.beta, self.temperature = cfg.KD.DKD.ALPHA, cfg.KD.DKD.BETA, cfg.KD.DKD.T

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        logits = seen.logits_student
        if not len(logits):  # the mean over no proposal would be NaN
            return {"loss_dkd": logits.sum()}
        logits_teacher = proposal_logits(seen.heads_teacher, seen.maps_teacher, seen.boxes)
        return {"loss_dkd": dkd_loss(logits, logits_teacher, seen.classes, self.alpha, self.beta, self.temperature)}


class ReviewKDLoss(nn.Module):
    """`hcl_loss` between the teacher's maps and the student's after fusion, over all levels of the pyramid.

    Args:
        shapes_student: of the student's maps.
        shapes_teacher: of the teacher's.

    Raises:
        UserError: the two pyramids have different levels.

    Reference: Chen et al. 2021, arXiv 2104.09044, section 3.
    """

    def __init__(self, cfg: CfgNode, shapes_student: Shapes, shapes_teacher: Shapes) -> None:
        super().__init__()
        self.weight = cfg.KD.REVIEWKD.LOSS_WEIGHT
        self.levels = sorted(shapes_student, key=lambda name: shapes_student[name].stride)
        if set(shapes_student) != set(shapes_teacher):
            levels = f"the student's {', '.join(shapes_student)}, the teacher's {', '.join(shapes_teacher)}"
            raise UserError(
                f"ReviewKD needs pyramids with the same levels: {levels}; set MODEL.BACKBONE and "
                "TEACHER.MODEL.BACKBONE to networks that have the same, or KD.TYPE to DKD"
            )
        in_channels, out_channels = (
            [shapes[name].channels for name in self.levels] for shapes in (shapes_student, shapes_teacher)
        )
        self.abfs = build_abfs(in_channels, out_channels)

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        maps_teacher = [seen.maps_teacher[name] for name in self.levels]
        maps_student = [seen.maps_student[name] for name in self.levels]
        fused = review(self.abfs, maps_student, [m.shape[-2:] for m in maps_teacher])
        return {"loss_reviewkd": self.weight * hcl_loss(fused, maps_teacher)}


Builder = Callable[[CfgNode, Shapes, Shapes], dict[str, nn.Module]]
# Each builds its losses from the configuration and both pyramids' shapes, by their names in the state dict.
kd_types = Registry("KD.TYPE")


@kd_types.register("DKD")
def _dkd(cfg: CfgNode, shapes_student: Shapes, shapes_teacher: Shapes) -> dict[str, nn.Module]:
    return {"kd_logits": DKDLoss(cfg)}


@kd_types.register("ReviewKD")
def _reviewkd(cfg: CfgNode, shapes_student: Shapes, shapes_teacher: Shapes) -> dict[str, nn.Module]:
    return {"kd_trans": ReviewKDLoss(cfg, shapes_student, shapes_teacher)}


@kd_types.register("ReviewDKD")
def _reviewdkd(cfg: CfgNode, *shapes: Shapes) -> dict[str, nn.Module]:
    return _dkd(cfg, *shapes) | _reviewkd(cfg, *shapes)
