"""Cross-view consistency: the student's prediction of each view approaches the teacher's of this and the other view."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode as CN

from ..dataset.batch import VIEWS
from ..ranges import NOT_NEGATIVE, TEMPERATURE, interval
from ._base import Distiller, Losses, register
from ._logits import check_logits, kl_divergence, logit_stand, softened
from ._precision import full_precision


@full_precision
def crld_loss(
    student_weak: Tensor,
    teacher_weak: Tensor,
    student_strong: Tensor,
    teacher_strong: Tensor,
    temperature: float,
    within_weight: float,
    cross_weight: float,
    tau_weak: float,
    tau_strong: float,
    logit_stand: bool = False,
) -> Tensor:
    """KL divergences within each view and across the two, of images of which the teacher is sure enough.

        loss = within_weight * mean_B[ M_w (K(w, w) + K(s, s)) ] + cross_weight * mean_B[ M_s (K(w, s) + K(s, w)) ]
        K(a, b) = T^2 KL(teacher on view a || student on view b)

    M_w is 1 where the teacher's largest probability on the weak view, at temperature 1, is at least `tau_weak`, else 0;
    M_s likewise on the strong view. So M_w also decides on K(s, s), and M_s on both cross terms. The means are over
    all B images.

    Args:
        student_weak, teacher_weak, student_strong, teacher_strong: logits (B, C), before softmax; the teacher's are
            not detached here.
        temperature: T > 0.
        logit_stand: standardise the logits for KL, not for the masks; see `_logits.standardized`.

    Returns:
        () in nats, >= 0, the student's dtype; float32 for half precision.

    Raises:
        ValueError: T <= 0.
        UserError: the logits differ in shape.

    Cost: O(B C).

    Reference: Zhang et al. 2024, arXiv 2412.16493; the masks as in the released code.
    """
    for student, teacher in ((student_weak, teacher_weak), (student_strong, teacher_strong)):
        check_logits(student, teacher, temperature)
    sure_weak, sure_strong = (
        (logits.softmax(dim=1).amax(dim=1) >= tau).to(logits.dtype)
        for logits, tau in ((teacher_weak, tau_weak), (teacher_strong, tau_strong))
    )
    s_weak, t_weak, s_strong, t_strong = (
        F.log_softmax(softened(logits, temperature, logit_stand), dim=1)
        for logits in (student_weak, teacher_weak, student_strong, teacher_strong)
    )
    within = sure_weak * (kl_divergence(s_weak, t_weak) + kl_divergence(s_strong, t_strong))
    cross = sure_strong * (kl_divergence(s_strong, t_weak) + kl_divergence(s_weak, t_strong))
    return (within_weight * within + cross_weight * cross).mean() * temperature**2


@register(
    "CRLD",
    CN({"CE_WEIGHT": 1.0, "WV_WEIGHT": 2.0, "CV_WEIGHT": 0.5, "T": 4.0, "TAU_W": 0.9, "TAU_S": 0.2}),
    ranges={
        "CE_WEIGHT": NOT_NEGATIVE, "WV_WEIGHT": NOT_NEGATIVE, "CV_WEIGHT": NOT_NEGATIVE, "T": TEMPERATURE,
        "TAU_W": interval(0, 1, "[]"), "TAU_S": interval(0, 1, "[]"),
    },
)
class CRLD(Distiller):
    """Cross-entropy with the labels on both views, and `crld_loss`; the logits that it returns are the weak view's."""

    needs_batch = VIEWS
    teacher_outputs = ("logits",)
    soft_labels = True
    label_weight = "CE_WEIGHT"
    standardizes_logits = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN) -> None:
        super().__init__(student, teacher)
        own = cfg.CRLD
        self.ce_loss_weight = own.CE_WEIGHT
        self.of_loss = own.T, own.WV_WEIGHT, own.CV_WEIGHT, own.TAU_W, own.TAU_S, logit_stand(cfg)

    def forward_train(  # type: ignore[override]
        self, image_weak: Tensor, image_strong: Tensor, target: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Losses]:
        weak, strong = self.student(image_weak)[0], self.student(image_strong)[0]
        teachers = self.teacher_forward(image_weak)[0], self.teacher_forward(image_strong)[0]
        loss_ce = self.cross_entropy(weak, target, **kwargs) + self.cross_entropy(strong, target, **kwargs)
        return weak, {
            "loss_ce": self.ce_loss_weight * loss_ce,
            "loss_kd": crld_loss(weak, teachers[0], strong, teachers[1], *self.of_loss),
        }
