"""CTKD: a temperature that is trained against the student, from an easy start on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from yacs.config import CfgNode as CN

from ..models.parameters import Group
from ..ranges import NOT_NEGATIVE, TEMPERATURE, interval, whole
from ..registry import Registry
from ._base import Distiller, LogitDistiller, cosine_fall, register, warm_up
from ._logits import logit_stand
from .DKD import dkd_loss
from .KD import kd_loss
from .registration import distiller_dict

# (student's logits, teacher's logits, labels, temperature, epoch) -> ()
SoftLoss = Callable[[Tensor, Tensor, Tensor, Tensor, Any], Tensor]

DEFAULTS = CN(
    {
        # The method whose temperature is trained: KD or DKD.
        "BASE": "KD",
        "T_START": 1.0,
        "T_RANGE": 20.0,
        # The gradient's factor goes from LAMBDA_MAX to LAMBDA_MIN in LOOPS epochs.
        "LAMBDA_MAX": 0.0,
        "LAMBDA_MIN": -1.0,
        "LOOPS": 10,
        # Of theta alone; the authors' is SOLVER.WEIGHT_DECAY.
        "WEIGHT_DECAY": 0.0,
        # Of KD; DKD's weights are those of its own section.
        "LOSS": CN({"CE_WEIGHT": 0.1, "KD_WEIGHT": 0.9}),
    }
)

# BASE is checked where it is looked up, with the names that resemble it.
RANGES = {
    "T_START": TEMPERATURE,
    "T_RANGE": NOT_NEGATIVE,
    "LAMBDA_MAX": interval(-1e9, 1e9, "[]"),
    "LAMBDA_MIN": interval(-1e9, 1e9, "[]"),
    "LOOPS": whole(1),
    "WEIGHT_DECAY": NOT_NEGATIVE,
    "LOSS.CE_WEIGHT": NOT_NEGATIVE,
    "LOSS.KD_WEIGHT": NOT_NEGATIVE,
}

# CTKD.BASE -> function of the whole configuration: the weight of the cross-entropy, and the loss at a temperature.
ctkd_bases: Registry = Registry("method with a trained temperature (CTKD.BASE)")


@ctkd_bases.register("KD")
def _kd(cfg: CN) -> tuple[float, SoftLoss]:
    weight, stand = cfg.CTKD.LOSS.KD_WEIGHT, logit_stand(cfg)

    def loss(student: Tensor, teacher: Tensor, target: Tensor, temperature: Tensor, epoch: Any) -> Tensor:
        return weight * kd_loss(student, teacher, temperature, stand)

    return cfg.CTKD.LOSS.CE_WEIGHT, loss


@ctkd_bases.register("DKD")
def _dkd(cfg: CN) -> tuple[float, SoftLoss]:
    alpha, beta, warmup, stand = cfg.DKD.ALPHA, cfg.DKD.BETA, cfg.DKD.WARMUP, logit_stand(cfg)

    def loss(student: Tensor, teacher: Tensor, target: Tensor, temperature: Tensor, epoch: Any) -> Tensor:
        return warm_up(epoch, warmup) * dkd_loss(student, teacher, target, alpha, beta, temperature, stand)

    return cfg.DKD.CE_WEIGHT, loss


def curriculum_temperature(theta: Tensor, factor: float | Tensor, start: float, span: float) -> Tensor:
    """The temperature of theta, of whose gradient `factor` times reaches theta.

        T = start + span * sigmoid(theta),   dL/dtheta := factor * dL/dT * dT/dtheta

    The value does not depend on `factor`. With -1, theta climbs the loss that the optimizer descends.

    Args:
        theta: of any shape.
        factor: a number, or a tensor () for the tensor () that a compiled step gets as its epoch.
        start, span: T is in (start, start + span).

    Returns:
        theta's shape; without a unit, as a temperature is.

    Reference: Li et al. 2023, arXiv 2211.16231, section 3.
    """
    fixed = theta.detach()
    return start + span * torch.sigmoid(fixed + factor * (theta - fixed))


@register("CTKD", DEFAULTS, ranges=RANGES)
class CTKD(LogitDistiller):
    """KD or DKD at a temperature that is trained to make the loss harder, more so from epoch to epoch.

        T = T_START + T_RANGE * sigmoid(global_T)
        factor(epoch) = LAMBDA_MIN + (LAMBDA_MAX - LAMBDA_MIN) * (1 + cos(pi min(epoch, LOOPS) / LOOPS)) / 2

    `global_T` (1,) starts at 1, so at T = 15.62; its gradient is multiplied by the factor. T is logged each epoch. The
    weights of CTKD.BASE KD are LOSS.CE_WEIGHT and LOSS.KD_WEIGHT; DKD's, and its warm-up, are in the section DKD.

    `global_T` has the optimizer's learning rate and momentum, and the weight decay WEIGHT_DECAY. The authors' code
    decays it with all other parameters, which pulls T to the middle of its range.

    Raises:
        UserError: no such CTKD.BASE.

    Reference: Li et al. 2023, arXiv 2211.16231.
    """

    teacher_outputs = ("logits",)
    standardizes_logits = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN) -> None:
        super().__init__(student, teacher)
        own = cfg.CTKD
        self.ce_loss_weight, self.soft_loss = ctkd_bases[own.BASE](cfg)
        self.start, self.span = own.T_START, own.T_RANGE
        self.least, self.most, self.loops = own.LAMBDA_MIN, own.LAMBDA_MAX, own.LOOPS
        self.weight_decay = own.WEIGHT_DECAY
        self.global_T = nn.Parameter(torch.ones(1))
        setattr(self, "reads_labels", self.judged_as(cfg).reads_labels)  # noqa: B010

    @classmethod
    def judged_as(cls, cfg: CN) -> type[Distiller]:
        """The method whose temperature is trained."""
        ctkd_bases[cfg.CTKD.BASE]  # or it is none of them
        return distiller_dict[cfg.CTKD.BASE]

    @classmethod
    def config_sections(cls, cfg: CN) -> set[str]:
        """CTKD's, and DKD's for CTKD.BASE DKD."""
        return {"CTKD"} | ({"DKD"} if cfg.CTKD.BASE == "DKD" else set())

    @classmethod
    def label_weights(cls, cfg: CN) -> tuple[str, ...] | None:
        return None if cls.judged_as(cfg).reads_labels else ("CTKD.LOSS.CE_WEIGHT",)

    def get_learnable_parameters(self) -> list[nn.Parameter | Group]:
        # Groups alone, which torch.optim takes as they are.
        own: Group = {"params": [self.global_T], "weight_decay": self.weight_decay}
        return [{"params": super().get_learnable_parameters()}, own]

    def get_extra_parameters(self) -> int:
        return self.global_T.numel()

    def temperature(self, epoch: int | Tensor) -> Tensor:
        """T (1,), with the gradient of this epoch."""
        factor = self.least + (self.most - self.least) * cosine_fall(epoch, 0, self.loops)
        return curriculum_temperature(self.global_T, factor, self.start, self.span)

    def metrics(self) -> dict[str, Tensor]:
        return {"temperature": self.temperature(self.loops).detach()}

    def logit_loss(self, logits_student: Tensor, logits_teacher: Tensor, target: Tensor, **kwargs: Any) -> Tensor:
        epoch = kwargs["epoch"]
        return self.soft_loss(logits_student, logits_teacher, target, self.temperature(epoch), epoch)
