"""RCNNKD: a detectron2 R-CNN that learns from another one while it trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, build_model
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, StandardROIHeads
from torch import Tensor

from mdistiller.errors import UserError

from .config import check_pair
from .losses import Maps, Seen, kd_types


@META_ARCH_REGISTRY.register()
class RCNNKD(GeneralizedRCNN):
    """A student, an unmodified `GeneralizedRCNN`, with a frozen teacher.

    In training it returns the student's own losses and those of KD.TYPE. The teacher sees the student's images, with
    its own mean, standard deviation and channel order, and the student's sampled proposals. Inference runs only the
    student. The teacher's parameters and buffers never change; their names in the state dict begin with `teacher.`,
    as in the published files.

    Args:
        teacher: an R-CNN with `StandardROIHeads`, with the student's classes.
        kd_losses: modules by name, each from a `Seen` to a dict of losses; `kd_types` builds them.
        student: the arguments of `GeneralizedRCNN`.

    Raises:
        UserError: student or teacher has other heads than `StandardROIHeads`. Built from a configuration, also what
            `check_pair` and the losses refuse, and a feature that the backbone does not have.
    """

    @configurable
    def __init__(self, *, teacher: GeneralizedRCNN, kd_losses: dict[str, nn.Module], **student: Any) -> None:
        super().__init__(**student)
        for whose, heads in (("MODEL", self.roi_heads), ("TEACHER.MODEL", teacher.roi_heads)):
            predictor = getattr(heads, "box_predictor", None)  # a cascade has several
            if not (isinstance(heads, StandardROIHeads) and isinstance(predictor, FastRCNNOutputLayers)):
                raise UserError(f"{whose}.ROI_HEADS.NAME must be StandardROIHeads, it is {type(heads).__name__}")
        self.teacher = teacher.requires_grad_(False).eval()
        self.kd_names = list(kd_losses)
        for name, loss in kd_losses.items():
            self.add_module(name, loss)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        check_pair(cfg)
        with known_features("MODEL", cfg.MODEL):
            student = super().from_config(cfg)
        with known_features("TEACHER.MODEL", cfg.TEACHER.MODEL):
            teacher = build_model(cfg.TEACHER)
        shapes = [backbone.output_shape() for backbone in (student["backbone"], teacher.backbone)]
        return {**student, "teacher": teacher, "kd_losses": kd_types[cfg.KD.TYPE](cfg, *shapes)}

    def train(self, mode: bool = True) -> RCNNKD:
        """Training mode for everything but the teacher."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """detectron2's batch -> the losses by name in training, else one prediction per image."""
        if not self.training:
            return self.inference(batched_inputs)
        heads = self.roi_heads
        with last_call(self.backbone, heads, heads.box_pooler, heads.box_predictor) as calls:
            losses = super().forward(batched_inputs)
        (_, maps), (_, (proposals, _)), ((_, boxes), _), (_, (logits, _)) = calls
        seen = Seen(
            maps_student=maps,
            maps_teacher=self.teacher_maps(batched_inputs),
            boxes=boxes,
            classes=torch.cat([p.gt_classes for p in proposals]),
            logits_student=logits,
            heads_teacher=self.teacher.roi_heads,
        )
        for name in self.kd_names:
            losses.update(self.get_submodule(name)(seen))
        return losses

    @torch.no_grad()
    def teacher_maps(self, batched_inputs: list[dict[str, Any]]) -> Maps:
        """The teacher's feature maps of the student's images."""
        if self.teacher.input_format != self.input_format:
            batched_inputs = [{"image": x["image"].flip(0)} for x in batched_inputs]
        images: Tensor = self.teacher.preprocess_image(batched_inputs).tensor
        return self.teacher.backbone(images)


@contextmanager
def known_features(whose: str, model: CfgNode) -> Iterator[None]:
    """Around building `model`, the configuration at the key `whose`: name the feature that its network does not have.

    Raises:
        UserError: detectron2 raised a KeyError for a feature of one of the IN_FEATURES.
    """
    try:
        yield
    except KeyError as error:
        feature = error.args[0]
        keys = [part for part in ("FPN", "RPN", "ROI_HEADS") if feature in model[part].IN_FEATURES]
        if not keys:
            raise
        names = " and ".join(f"{whose}.{key}.IN_FEATURES" for key in keys)
        raise UserError(
            f"{names}: {feature!r} is not a feature of {whose}.BACKBONE.NAME {model.BACKBONE.NAME}"
        ) from None


@contextmanager
def last_call(*modules: nn.Module) -> Iterator[list[Any]]:
    """Record (positional arguments, output) of the last call of each of `modules`, in their order.

    So detectron2's own forward pass of the student runs once, and its intermediate results are still available.
    """
    calls: list[Any] = [None] * len(modules)

    def keep(i: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            calls[i] = (args, output)

        return hook

    handles = [module.register_forward_hook(keep(i)) for i, module in enumerate(modules)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
