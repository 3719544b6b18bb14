"""Scale-decoupled distillation: a logit loss for every region of the last map, of three sizes of regions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode as CN

from ..ranges import WHOLE, Range, list_of, whole
from ._base import Distiller, Losses, register, warm_up
from ._last_map import last_map_classifier
from ._logits import (
    check_logits,
    check_two_classes,
    kl_divergence,
    logit_stand,
    one_against_others,
    soft_cross_entropy,
    softened,
)
from ._pooling import average_pool
from ._precision import full_precision
from .registration import declare_defaults

SCALES = ([1, 2], [1, 2, 4])


def pooled_regions(last_map: Tensor, scales: Sequence[int] = (1, 2, 4)) -> Tensor:
    """The means of a map's regions: (B, D, H, W) -> (B, D, R), R = 5 for the scales [1, 2], 21 for [1, 2, 4].

    In this order: the whole map, its 2x2 regions row by row, its 4x4 regions row by row. The 4x4 are adaptive averages
    (`average_pool`); the 2x2 and the whole map are means of these, also for [1, 2], as in the released code. So where 4
    does not divide the map's size, a 2x2 region is not the adaptive average of the map itself.

    Args:
        scales: [1, 2] or [1, 2, 4].
    """
    fine = average_pool(last_map, (4, 4))
    maps = {1: F.avg_pool2d(fine, 4), 2: F.avg_pool2d(fine, 2), 4: fine}
    return torch.cat([maps[n].flatten(2) for n in scales], dim=2)


@full_precision
def region_logits(
    last_map: Tensor, weight: Tensor, bias: Tensor | None = None, scales: Sequence[int] = (1, 2, 4)
) -> Tensor:
    """A network's classifier on the mean of each region of its last map: (B, D, H, W) -> (B, C, R).

    Args:
        weight, bias: (C, D) and (C,), of the classifier.
        scales: see `pooled_regions`.
    """
    logits = torch.einsum("cd,bdr->bcr", weight, pooled_regions(last_map, scales))
    return logits if bias is None else logits + bias[:, None]


def region_weights(regions_teacher: Tensor, target: Tensor) -> Tensor:
    """2 where the teacher's prediction of a region is right and that of the whole map is wrong, or vice versa; else 1.

    Args:
        regions_teacher: (B, C, R) logits, the whole map first.
        target: (B,) int64, the labels.

    Returns:
        (B, R), float32 or float64.
    """
    right = regions_teacher.argmax(dim=1) == target.unsqueeze(1)
    return 1 + (right != right[:, :1]).to(regions_teacher.dtype)


@full_precision
def sdd_kd_loss(
    regions_student: Tensor,
    regions_teacher: Tensor,
    target: Tensor,
    temperature: float,
    logit_stand: bool = False,
) -> Tensor:
    """KD's loss of every region, weighted.

        loss = mean_BR[ w * T^2 * KL(p_t || p_s) ],   p = softmax(z / T),   w: `region_weights`

    A class that is masked out by a teacher logit of -inf contributes 0.

    Args:
        regions_student: (B, C, R) logits of the regions, see `region_logits`.
        regions_teacher: (B, C, R), the whole map first; not detached here.
        target: (B,) int64, the labels.
        temperature: T > 0.
        logit_stand: standardise the logits of each region first, see `_logits.standardized`.

    Returns:
        () in nats, >= 0, the student's dtype; float32 for half precision.

    Raises:
        UserError: the shapes differ.
        ValueError: T <= 0.

    Cost: O(B C R), and O(B D C R) for the regions' logits.

    Reference: Wei et al. 2024, arXiv 2403.13512.
    """
    check_logits(regions_student, regions_teacher, temperature)
    student, teacher = (
        F.log_softmax(softened(z, temperature, logit_stand), dim=1) for z in (regions_student, regions_teacher)
    )
    return temperature**2 * (region_weights(regions_teacher, target) * kl_divergence(student, teacher)).mean()


@full_precision
def sdd_dkd_loss(
    regions_student: Tensor,
    regions_teacher: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
    logit_stand: bool = False,
) -> Tensor:
    """DKD's loss of every region, weighted.

        loss = mean_BR[ w * T^2 * (alpha * KL(b_t || b_s) + beta * KL(q_t || q_s)) ],   p = softmax(z / T)
        b = (p_y, 1 - p_y),   q = softmax(z / T) over the classes other than y,   w: `region_weights`

    Masked classes and two classes are as in `dkd_loss`.

    Args:
        alpha, beta: weights of the target and of the non-target term.
        regions_student, regions_teacher, target, temperature, logit_stand: see `sdd_kd_loss`.

    Returns:
        () in nats, >= 0, the student's dtype; float32 for half precision.

    Raises:
        UserError: the shapes differ.
        ValueError: T <= 0, or C < 2.

    Cost, reference: see `sdd_kd_loss`.
    """
    check_logits(regions_student, regions_teacher, temperature)
    check_two_classes("SDD_DKD", regions_student)
    (binary_s, others_s), (binary_t, others_t) = (
        one_against_others(_by_region(softened(z, temperature, logit_stand)), _labels(target, z))
        for z in (regions_student, regions_teacher)
    )
    values = alpha * kl_divergence(binary_s, binary_t) + beta * kl_divergence(others_s, others_t)
    return temperature**2 * (region_weights(regions_teacher, target).flatten() * values).mean()


@full_precision
def sdd_nkd_loss(
    regions_student: Tensor,
    regions_teacher: Tensor,
    target: Tensor,
    temperature: float,
    gamma: float,
    logit_stand: bool = False,
    keep_target: bool = False,
) -> Tensor:
    """NKD's loss of every region, weighted.

        loss = mean_BR[ w * (-p_t(y) * log p_s(y) - gamma * T^2 * sum_{j != y} n_t(j) * log n_s(j)) ]
        p = softmax(z),   n = softmax(z / T) over the classes other than y,   w: `region_weights`

    Masked classes and two classes are as in `nkd_loss`.

    Args:
        gamma: weight of the second term.
        keep_target: n and the sum are over all classes, as in the released code of SDD.
        regions_student, regions_teacher, target, temperature, logit_stand: see `sdd_kd_loss`.

    Returns:
        () in nats, >= 0, the student's dtype; float32 for half precision.

    Raises:
        UserError: the shapes differ.
        ValueError: T <= 0, or C < 2.

    Cost, reference: see `sdd_kd_loss`.
    """
    check_logits(regions_student, regions_teacher, temperature)
    check_two_classes("SDD_NKD", regions_student)
    of_target, others = [], []
    for regions in (regions_student, regions_teacher):
        labels = _labels(target, regions)
        plain, soft = (_by_region(softened(regions, t, logit_stand)) for t in (1.0, temperature))
        of_target.append(one_against_others(plain, labels)[0][:, :1])
        others.append(F.log_softmax(soft, dim=1) if keep_target else one_against_others(soft, labels)[1])
    values = soft_cross_entropy(*of_target) + gamma * temperature**2 * soft_cross_entropy(*others)
    return (region_weights(regions_teacher, target).flatten() * values).mean()


def _by_region(logits: Tensor) -> Tensor:
    """(B, C, R) -> (B R, C)."""
    return logits.transpose(1, 2).flatten(0, 1)


def _labels(target: Tensor, regions: Tensor) -> Tensor:
    """(B,) -> (B R,): the label of each region."""
    return target.repeat_interleave(regions.shape[2])


declare_defaults(
    "SDD",
    CN({"M": [1, 2, 4], "NKD_WARMUP": 20, "NKD_KEEPS_TARGET": False}),
    ranges={
        "M": Range("[1, 2] or [1, 2, 4]", lambda v: list_of(WHOLE).holds(v) and list(v) in SCALES),
        "NKD_WARMUP": whole(0),
    },
)


class SDD(Distiller):
    """What the three methods share: the logits of the regions of both networks' last maps, by their own classifiers.

    The student itself does not change. A network whose logits are not its classifier's output for the mean of its last
    map is refused.
    """

    needs_run = ("image_size",)
    standardizes_logits = True
    # The section of the method whose loss it applies to the regions.
    base_section = ""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN, image_size: int | None = None) -> None:
        super().__init__(student, teacher)
        self.scales = list(cfg.SDD.M)
        self.logit_stand = logit_stand(cfg)
        # In a tuple, as they are parts of the networks.
        self.classifiers = tuple(
            last_map_classifier(network, role, type(self).__name__, cfg, image_size)[0]
            for role, network in (("student", student), ("teacher", teacher))
        )

    @classmethod
    def config_sections(cls, cfg: CN) -> set[str]:
        return {"SDD", cls.base_section}

    def regions(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The student's logits (B, C), and the logits (B, C, R) of the student's and of the teacher's regions."""
        logits, features_s = self.student(image)
        _, features_t = self.teacher_forward(image)
        regions_s, regions_t = (
            region_logits(features["last_map"], classifier.weight, classifier.bias, self.scales)
            for features, classifier in zip((features_s, features_t), self.classifiers)
        )
        return logits, regions_s, regions_t


@register("SDD_KD", section="SDD")
class SDD_KD(SDD):
    """Cross-entropy with the labels and `sdd_kd_loss` with the teacher, by the weights and the temperature of KD."""

    teacher_outputs = ("last_map",)
    soft_labels = True
    reads_labels = True  # a region's weight depends on the one class of the image
    base_section = "KD"

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN, image_size: int | None = None) -> None:
        super().__init__(student, teacher, cfg, image_size)
        self.temperature = cfg.KD.TEMPERATURE
        self.ce_loss_weight = cfg.KD.LOSS.CE_WEIGHT
        self.kd_loss_weight = cfg.KD.LOSS.KD_WEIGHT

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, Losses]:
        logits, regions_s, regions_t = self.regions(image)
        loss_kd = sdd_kd_loss(regions_s, regions_t, target, self.temperature, self.logit_stand)
        return logits, {
            "loss_ce": self.ce_loss_weight * self.cross_entropy(logits, target, **kwargs),
            "loss_kd": self.kd_loss_weight * loss_kd,
        }


@register("SDD_DKD", section="SDD")
class SDD_DKD(SDD):
    """Cross-entropy with the labels and `sdd_dkd_loss` with the teacher, by the settings of DKD, warm-up included."""

    teacher_outputs = ("last_map",)
    soft_labels = True
    reads_labels = True  # its two terms are for one target class and for the others
    base_section = "DKD"

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN, image_size: int | None = None) -> None:
        super().__init__(student, teacher, cfg, image_size)
        self.ce_loss_weight = cfg.DKD.CE_WEIGHT
        self.alpha = cfg.DKD.ALPHA
        self.beta = cfg.DKD.BETA
        self.temperature = cfg.DKD.T
        self.warmup = cfg.DKD.WARMUP

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, Losses]:
        logits, regions_s, regions_t = self.regions(image)
        weights = self.alpha, self.beta
        loss_dkd = sdd_dkd_loss(regions_s, regions_t, target, *weights, self.temperature, self.logit_stand)
        return logits, {
            "loss_ce": self.ce_loss_weight * self.cross_entropy(logits, target, **kwargs),
            "loss_kd": warm_up(kwargs["epoch"], self.warmup) * loss_dkd,
        }


@register("SDD_NKD", section="SDD")
class SDD_NKD(SDD):
    """Cross-entropy with the labels and `sdd_nkd_loss` with the teacher, by the settings of NKD.

    The weight of `sdd_nkd_loss` grows linearly over the first SDD.NKD_WARMUP epochs. SDD.NKD_KEEPS_TARGET computes it
    as the released code does.
    """

    teacher_outputs = ("last_map",)
    soft_labels = True
    reads_labels = True  # its two terms are for one target class and for the others
    base_section = "NKD"

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN, image_size: int | None = None) -> None:
        super().__init__(student, teacher, cfg, image_size)
        self.temperature = cfg.NKD.TEMPERATURE
        self.gamma = cfg.NKD.GAMMA
        self.ce_loss_weight = cfg.NKD.LOSS.CE_WEIGHT
        self.kd_loss_weight = cfg.NKD.LOSS.KD_WEIGHT
        self.warmup = cfg.SDD.NKD_WARMUP
        self.keep_target = cfg.SDD.NKD_KEEPS_TARGET

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, Losses]:
        logits, regions_s, regions_t = self.regions(image)
        loss_nkd = sdd_nkd_loss(
            regions_s, regions_t, target, self.temperature, self.gamma, self.logit_stand, self.keep_target
        )
        return logits, {
            "loss_ce": self.ce_loss_weight * self.cross_entropy(logits, target, **kwargs),
            "loss_kd": self.kd_loss_weight * warm_up(kwargs["epoch"], self.warmup) * loss_nkd,
        }
