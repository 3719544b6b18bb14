"""Class attention transfer: the student learns where in the image the teacher sees each class."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode as CN

from ..errors import UserError
from ..ranges import NOT_NEGATIVE, whole
from ._base import Distiller, Losses, register
from ._last_map import last_map_classifier
from ._pooling import average_pool
from ._precision import full_precision


@full_precision
def class_maps(last_map: Tensor, weight: Tensor, resolution: int) -> Tensor:
    """The classifier, without its bias, at every position of the last map, averaged to r x r: (B, C, r, r).

    The averages are taken first, which gives the same, as both are linear.

    Args:
        last_map: (B, D, H, W).
        weight: (C, D), of the classifier.
        resolution: r.
    """
    return torch.einsum("cd,bdhw->bchw", weight, average_pool(last_map, (resolution, resolution)))


@full_precision
def cat_loss(maps_student: Tensor, maps_teacher: Tensor, normalize: bool = False) -> Tensor:
    """Mean squared difference of the class maps.

        loss = mean_{B C r r}[ (A_s - A_t)^2 ],   with `normalize` A / max(|A|_2, 1e-12), |A|_2 over the r r cells

    Args:
        maps_student: (B, C, r, r), see `class_maps`.
        maps_teacher: (B, C, r, r); not detached here.
        normalize: divide each map by its L2 norm first. A map of zeros stays zeros.

    Returns:
        () >= 0, in squared logits, or without unit where they are normalised; the student's dtype; float32 for half
        precision.

    Raises:
        UserError: the shapes differ.

    Cost: O(B C r r), and O(B D C r r) for the class maps.

    Reference: Guo et al. 2023, arXiv 2304.12777.
    """
    if maps_student.shape != maps_teacher.shape:
        raise UserError(
            f"student class maps {tuple(maps_student.shape)} and teacher class maps {tuple(maps_teacher.shape)} differ "
            "in shape; both networks must know the same classes"
        )
    student, teacher = maps_student.flatten(2), maps_teacher.flatten(2)
    if normalize:
        student, teacher = F.normalize(student, dim=2), F.normalize(teacher, dim=2)
    return (student - teacher).square().mean()


@register(
    "CAT_KD",
    CN({
        "LOSS": CN({"CE_WEIGHT": 1.0, "CAT_loss_weight": 15.0, "CAM_RESOLUTION": 2}),
        "IF_NORMALIZE": False,
    }),
    ranges={
        "LOSS.CE_WEIGHT": NOT_NEGATIVE, "LOSS.CAT_loss_weight": NOT_NEGATIVE, "LOSS.CAM_RESOLUTION": whole(1),
    },
)  # fmt: skip
class CAT_KD(Distiller):
    """Cross-entropy with the labels and `cat_loss` between both networks' class maps.

    The networks stay as they are, with their biases; the authors rebuild both. The defaults are the authors' values for
    resnet32x4 and resnet8x4.
    """

    needs_run = ("image_size",)
    teacher_outputs = ("last_map",)
    soft_labels = True
    label_weight = "LOSS.CE_WEIGHT"

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN, image_size: int | None = None) -> None:
        super().__init__(student, teacher)
        own = cfg.CAT_KD
        self.ce_loss_weight = own.LOSS.CE_WEIGHT
        self.cat_loss_weight = own.LOSS.CAT_loss_weight
        self.resolution = own.LOSS.CAM_RESOLUTION
        self.normalize = own.IF_NORMALIZE
        # In a tuple, as they are parts of the networks.
        self.classifiers = tuple(
            last_map_classifier(network, role, "CAT_KD", cfg, image_size)[0]
            for role, network in (("student", student), ("teacher", teacher))
        )

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, Losses]:
        logits, features_s = self.student(image)
        _, features_t = self.teacher_forward(image)
        maps_s, maps_t = (
            class_maps(features["last_map"], classifier.weight, self.resolution)
            for features, classifier in zip((features_s, features_t), self.classifiers)
        )
        return logits, {
            "loss_CE": self.ce_loss_weight * self.cross_entropy(logits, target, **kwargs),
            "loss_CAT": self.cat_loss_weight * cat_loss(maps_s, maps_t, self.normalize),
        }
