"""Multi-level logit distillation: images, batch and classes, at several temperatures, on two views of each image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode as CN

from ..dataset.batch import VIEWS
from ..distributed.gather import gather_batch
from ..ranges import NOT_NEGATIVE, TEMPERATURE
from ._base import Distiller, Losses, register
from ._logits import check_logits, kl_divergence, logit_stand, softened
from ._precision import full_precision

# Beside TEMPERATURE. The released code has the last two of the strong view read the weak one.
_TEMPERATURES = (3.0, 5.0, 2.0, 6.0)
_WEAK_AGAIN = 2


@full_precision
def mlkd_loss(
    student_weak: Tensor,
    teacher_weak: Tensor,
    student_strong: Tensor,
    teacher_strong: Tensor,
    temperature: float,
    logit_stand: bool = False,
    as_released: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The alignment of single predictions, of classes and of images, summed over temperatures S = (T, 3, 5, 2, 6).

        kd = sum_S m T^2 mean_B KL(w) + sum_{T, 3, 5} T^2 mean_B KL(s) + sum_{2, 6} T^2 mean_B KL(w)
        cc = n sum_S |P_t' P_t - P_s' P_s|^2 / C,    bc = m sum_S |P_t P_t' - P_s P_s'|^2 / B

    with w and s the weak and the strong view, KL from the teacher's distribution to the student's, and P (B, C) the
    softened predictions of the weak view. m is the share of images of which the teacher is at most as sure as of the
    median one, n the share of classes to which it gives at most as much as to the median one, both on the weak view at
    temperature 1. That is the released code, on which the published figures hang.

    `as_released=False` is the reading that its commented lines suggest: m and n leave out images and classes one by
    one (rows of the matrices), m_i KL_i in place of m KL; and all five terms of the strong view are of the strong view.

    Args:
        student_weak, teacher_weak, student_strong, teacher_strong: logits (B, C), before softmax; the teacher's are
            not detached here.
        temperature: T > 0. With 2, as under `logit_stand`, temperature 2 counts twice.
        logit_stand: standardise the logits for KL, not for the matrices; see `_logits.standardized`.

    Returns:
        kd () in nats, cc () and bc (), each >= 0, in the student's dtype; float32 for half precision.

    Raises:
        ValueError: T <= 0.
        UserError: the logits differ in shape.

    Cost: O(S B C (B + C)) time, O(S (B^2 + C^2 + B C)) memory, S = 5.

    Reference: Jin et al. 2023, "Multi-level Logit Distillation", CVPR, equations 4 to 9.
    """
    for student, teacher in ((student_weak, teacher_weak), (student_strong, teacher_strong)):
        check_logits(student, teacher, temperature)
    temperatures = (temperature, *_TEMPERATURES)
    weak = _divergences(student_weak, teacher_weak, temperatures, logit_stand)
    only = temperatures[: -_WEAK_AGAIN] if as_released else temperatures
    strong = _divergences(student_strong, teacher_strong, only, logit_stand)

    p = teacher_weak.softmax(dim=1)
    images, classes = (_up_to_median(values).to(p.dtype) for values in (p.amax(dim=1), p.sum(dim=0)))
    if as_released:
        # A loss that is a number by then is multiplied with all of the mask: its mean is left.
        images, classes = images.mean().expand_as(images), classes.mean().expand_as(classes)
        strong = torch.cat([strong, weak[-_WEAK_AGAIN:]])
    kd = (weak * images + strong).mean(dim=1).sum()

    p_s, p_t = (_at(logits, temperatures).softmax(dim=2) for logits in (student_weak, teacher_weak))
    of_images = (p_t @ p_t.mT - p_s @ p_s.mT).square().sum(dim=2)
    of_classes = (p_t.mT @ p_t - p_s.mT @ p_s).square().sum(dim=2)
    cc, bc = (classes * of_classes).mean(dim=1).sum(), (images * of_images).mean(dim=1).sum()
    return kd, cc, bc


def _at(logits: Tensor, temperatures: Sequence[float]) -> Tensor:
    """The logits softened at each of S temperatures: (S, B, C)."""
    return torch.stack([softened(logits, temperature) for temperature in temperatures])


def _divergences(student: Tensor, teacher: Tensor, temperatures: Sequence[float], standardize: bool) -> Tensor:
    """T^2 KL of each image at each of S temperatures: (S, B)."""
    log_s, log_t = (
        F.log_softmax(_at(softened(logits, 1.0, standardize), temperatures), dim=2) for logits in (student, teacher)
    )
    divergences = kl_divergence(log_s.transpose(1, 2), log_t.transpose(1, 2))
    return torch.stack([own * temperature**2 for own, temperature in zip(divergences, temperatures)])


def _up_to_median(values: Tensor) -> Tensor:
    """Which of `values` (N,) are at most the median, which is between the middle two of an even number: (N,) bool."""
    ordered, last = values.sort().values, len(values) - 1
    return values <= ordered[last // 2].lerp(ordered[(last + 1) // 2], 0.5)


@register(
    "MLKD",
    CN({"TEMPERATURE": 4, "AS_RELEASED": True, "LOSS": CN({"CE_WEIGHT": 0.1, "KD_WEIGHT": 0.9})}),
    ranges={"TEMPERATURE": TEMPERATURE, "LOSS.CE_WEIGHT": NOT_NEGATIVE, "LOSS.KD_WEIGHT": NOT_NEGATIVE},
)
class MLKD(Distiller):
    """Cross-entropy with the labels on both views, and `mlkd_loss`; the logits that it returns are the weak view's.

    The student sees the views one after the other: in one batch of both, BatchNorm would take its statistics over both.
    """

    needs_batch = VIEWS
    teacher_outputs = ("logits",)
    soft_labels = True
    label_weight = "LOSS.CE_WEIGHT"
    standardizes_logits = True
    compares_images = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN) -> None:
        super().__init__(student, teacher)
        self.temperature = cfg.MLKD.TEMPERATURE
        self.as_released = cfg.MLKD.AS_RELEASED
        self.ce_loss_weight = cfg.MLKD.LOSS.CE_WEIGHT
        self.kd_loss_weight = cfg.MLKD.LOSS.KD_WEIGHT
        self.logit_stand = logit_stand(cfg)

    def forward_train(  # type: ignore[override]
        self, image_weak: Tensor, image_strong: Tensor, target: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Losses]:
        weak, strong = self.student(image_weak)[0], self.student(image_strong)[0]
        teachers = self.teacher_forward(image_weak)[0], self.teacher_forward(image_strong)[0]
        kd, cc, bc = mlkd_loss(
            gather_batch(weak), gather_batch(teachers[0]), gather_batch(strong), gather_batch(teachers[1]),
            self.temperature, self.logit_stand, self.as_released,
        )  # fmt: skip
        loss_ce = self.cross_entropy(weak, target, **kwargs) + self.cross_entropy(strong, target, **kwargs)
        return weak, {
            "loss_ce": self.ce_loss_weight * loss_ce,
            "loss_kd": self.kd_loss_weight * kd,
            "loss_cc": self.kd_loss_weight * cc,
            "loss_bc": self.kd_loss_weight * bc,
        }
