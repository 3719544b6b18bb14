"""SimKD: the student's last map, through a projector, goes into the teacher's own classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode as CN

from ..console import network_name
from ..errors import UserError
from ..models.classifier import classified
from ..models.cost import count_parameters
from ..models.parameters import Group
from ..models.trunk import Trunk, parameter_layer
from ..ranges import NOT_NEGATIVE, whole
from ._base import Distiller, Losses, register
from ._feature_maps import align, probe_pair, require_maps
from ._last_map import last_map_classifier
from ._pooling import pool_larger
from ._precision import full_precision
from .facts import image_size_of


@full_precision
def simkd_loss(projected: Tensor, f_t: Tensor) -> Tensor:
    """Mean squared difference of the projected student's map and the teacher's last map.

        loss = mean_(B, C, H, W)[ (P(f_s) - f_t)^2 ]

    Of two maps of different size the larger is average-pooled to the smaller.

    Args:
        projected: (B, C, H_s, W_s).
        f_t: (B, C, H_t, W_t).

    Returns:
        () >= 0, the dtype of `projected`; float32 for half precision.

    Raises:
        ValueError: the maps differ in their images or channels.

    Cost: negligible; the projector's is in `projector`.

    Reference: Chen et al. 2022, arXiv 2203.14001, equation 2.
    """
    if projected.shape[:2] != f_t.shape[:2]:
        shapes = f"the projected student's {tuple(projected.shape)}, the teacher's {tuple(f_t.shape)}"
        raise ValueError(f"SIMKD needs maps of as many images and channels: {shapes}")
    return F.mse_loss(*align(projected, f_t))


def projector(channels_s: int, channels_t: int, factor: int) -> nn.Sequential:
    """(B, C_s, H, W) -> (B, C_t, H, W): 1x1, 3x3 and 1x1 convolutions without biases, each with BatchNorm and ReLU.

    Between them there are M = C_t / factor channels, at least one. It has C_s M + 9 M^2 + M C_t weights, and two
    numbers for each channel of its BatchNorms.
    """
    between = max(channels_t // factor, 1)
    return nn.Sequential(
        nn.Conv2d(channels_s, between, 1, bias=False), nn.BatchNorm2d(between), nn.ReLU(inplace=True),
        nn.Conv2d(between, between, 3, padding=1, bias=False), nn.BatchNorm2d(between), nn.ReLU(inplace=True),
        nn.Conv2d(between, channels_t, 1, bias=False), nn.BatchNorm2d(channels_t), nn.ReLU(inplace=True),
    )  # fmt: skip


class SimKDNetwork(nn.Module):
    """What SimKD deploys: the student up to its last map, the projector, and the teacher's classifier of the mean.

    Args:
        student: image -> (anything, {"feats": [..., (B, C_s, H, W)]}).
        transfer: the projector.
        classifier: the teacher's, a linear layer or a 1x1 convolution.
        size: height and width to which a larger map of the student's is average-pooled: the teacher's.
    """

    def __init__(self, student: nn.Module, transfer: nn.Module, classifier: nn.Module, size: Sequence[int]) -> None:
        super().__init__()
        self.student, self.transfer, self.classifier = student, transfer, classifier
        self.size = size

    def project(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> the projected map (B, C_t, H_s, W_s)."""
        return self.transfer(pool_larger(self.student(image)[1]["feats"][-1], self.size))

    def classify(self, projected: Tensor) -> Tensor:
        """The logits (B, C) of a projected map."""
        return classified(projected, self.classifier)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, C)."""
        return self.classify(self.project(image))


@register(
    "SIMKD",
    CN({"FACTOR": 2, "LOSS": CN({"FEAT_WEIGHT": 1.0})}),
    ranges={"FACTOR": whole(1), "LOSS.FEAT_WEIGHT": NOT_NEGATIVE},
)
class SimKD(Distiller):
    """`simkd_loss` of the student's last feature map, projected, and the teacher's last map; nothing else.

    The logits, in training and of what is deployed, are those that the teacher's classifier gives for the mean of the
    projected map. The loss reads no labels. What of the student its last feature map does not need, as its classifier,
    gets no gradient, stays as it is, and is not deployed.

    Args:
        image_size: of the run.

    Raises:
        UserError: a network has vectors instead of maps, or the teacher has no last map, or no linear classifier, or
            one of another number of channels.
    """

    needs_run = ("image_size",)
    teacher_outputs = ("logits", "last_map")  # the logits too, as the classes of its classifier must be the data's
    soft_labels = True  # without a loss of the labels, mixed images are like others
    distills = False  # and so without a task loss

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN, image_size: int | None = None) -> None:
        super().__init__(student, teacher)
        self.feat_loss_weight = cfg.SIMKD.LOSS.FEAT_WEIGHT
        size = image_size or image_size_of(cfg)
        classifier, (channels_t, *size_t) = last_map_classifier(teacher, "teacher", "SIMKD", cfg, size)
        features_s, features_t = probe_pair(student, teacher, size)
        if not features_s["feats"]:
            raise UserError(f"SIMKD projects the student's last feature map, and {network_name(student)} has none")
        f_s = features_s["feats"][-1]
        require_maps([(f_s.shape, features_t["last_map"].shape)], "SIMKD", (student, teacher))
        self.transfer = projector(f_s.shape[1], channels_t, cfg.SIMKD.FACTOR)
        self._trunk = Trunk(student, _last_map, f_s.new_zeros(1, 3, size, size))
        for name in self._trunk.unused:
            student.get_parameter(name).requires_grad_(False)
        self.untrained = tuple(f"student.{name}" for name in self._trunk.unused)
        # In a tuple, as its layers are in the state dict already, under the names of student, projector and teacher.
        self._deployed = (SimKDNetwork(self._trunk.network, self.transfer, parameter_layer(classifier), size_t),)

    @classmethod
    def label_weights(cls, cfg: CN) -> tuple[str, ...]:
        """None: it reads no labels."""
        return ()

    def train(self, mode: bool = True) -> SimKD:
        super().train(mode)
        self._trunk.follow()
        return self

    def deployments(self) -> dict[str, nn.Module]:
        """The student up to its last map, with the projector and the teacher's classifier."""
        self._trunk.follow()
        return {"simkd": self._deployed[0]}

    def get_learnable_parameters(self) -> list[nn.Parameter | Group]:
        unused = set(self._trunk.unused)
        own = [p for name, p in self.student.named_parameters() if name not in unused]
        return [*own, *self.transfer.parameters()]

    def get_extra_parameters(self) -> int:
        """Those of the projector, which is deployed too."""
        return count_parameters(self.transfer)

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, Losses]:
        network = self._deployed[0]
        projected = network.project(image)
        _, features_teacher = self.teacher_forward(image)
        loss = simkd_loss(projected, features_teacher["last_map"])
        return network.classify(projected), {"loss_kd": self.feat_loss_weight * loss}


def _last_map(output: Any) -> Tensor:
    return output[1]["feats"][-1]
