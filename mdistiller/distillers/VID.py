"""Variational information distillation: maximise the information that the student's maps hold about the teacher's."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode as CN

from ..errors import UserError
from ..models.cost import count_parameters
from ..models.parameters import Group
from ..ranges import NOT_NEGATIVE, POSITIVE, list_of, whole
from ._base import FeatureDistiller, Features, register
from ._feature_maps import MapPairs, align, input_size, probe_pair
from ._precision import full_precision


def vid_loss(regressor: nn.Module, log_scale: Tensor, f_s: Tensor, f_t: Tensor, eps: float = 1e-5) -> Tensor:
    """Negative log-likelihood of the teacher's map under a Gaussian whose mean is regressed from the student's.

        loss = 1/2 * mean_(B, C, HW)[ (mu - t)^2 / v + log v ],   mu = regressor(f_s),   v = softplus(log_scale) + eps

    up to the constant log(2 pi) / 2; softplus(x) = log(1 + exp(x)).

    Args:
        regressor: (B, C_s, H, W) -> (B, C_t, H, W).
        log_scale: (C_t,), one variance for each channel of the teacher.
        f_s: the student's (B, C_s, H_s, W_s).
        f_t: the teacher's (B, C_t, H_t, W_t); if the sizes differ, the larger is average-pooled to the smaller.
        eps: > 0, lower bound of the variance.

    Returns:
        () in nats per element, may be negative; float32 for half precision.

    Reference: Ahn et al. 2019, arXiv 1904.05835, section 2.
    """
    f_s, f_t = align(f_s, f_t)
    return _gaussian_nll(regressor(f_s), f_t, log_scale, eps)


@full_precision
def _gaussian_nll(mean: Tensor, target: Tensor, log_scale: Tensor, eps: float) -> Tensor:
    variance = F.softplus(log_scale) + eps
    error = (mean - target).square().mean(dim=(0, 2, 3))
    return 0.5 * (error / variance + variance.log()).mean()


def _regressor(channels_s: int, channels_t: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_s, channels_t, kernel_size=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(channels_t, channels_t, kernel_size=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(channels_t, channels_t, kernel_size=1, bias=False),
    )


DEFAULTS = CN(
    {
        "EPS": 1e-5,
        "INIT_PRED_VAR": 5.0,
        "INPUT_SIZE": [32, 32],
        "LOSS": CN({"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 1.0}),
    }
)


RANGES = {
    "EPS": POSITIVE,
    "INIT_PRED_VAR": POSITIVE,
    "INPUT_SIZE": list_of(whole(1), 0, 2),
    "LOSS.CE_WEIGHT": NOT_NEGATIVE,
    "LOSS.FEAT_WEIGHT": NOT_NEGATIVE,
}


@register("VID", DEFAULTS, ranges=RANGES)
class VID(FeatureDistiller):
    """Cross-entropy with the labels and the sum of `vid_loss` over the pairs of stages, see `MapPairs`.

    `log_scales` are trained and saved like the `regressors`. The original did neither: so `get_extra_parameters()`
    does not count them, as the original's does not, and loading a state dict without them leaves them unchanged.

    Args:
        image_size: of the run; without it VID.INPUT_SIZE counts, [] for the data set's.

    Raises:
        UserError: a network has vectors instead of maps, INPUT_SIZE contradicts the run, or INIT_PRED_VAR does not
            exceed EPS > 0.
    """

    needs_run = ("image_size",)
    teacher_outputs = ("feats",)
    compares_maps = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN, image_size: int | None = None) -> None:
        super().__init__(student, teacher, cfg.VID)
        self.eps = cfg.VID.EPS
        surplus = cfg.VID.INIT_PRED_VAR - self.eps
        if surplus <= 0 or self.eps <= 0:
            raise UserError(f"VID needs INIT_PRED_VAR > EPS > 0, they are {cfg.VID.INIT_PRED_VAR} and {self.eps}")
        # The inverse of the softplus, log(exp(x) - 1), in a form that does not overflow.
        start = surplus + math.log(-math.expm1(-surplus))
        size = input_size(cfg.VID.INPUT_SIZE, image_size, cfg, "VID.INPUT_SIZE")
        self.pairs = MapPairs(student, teacher, probe_pair(student, teacher, size), cfg, "VID")
        self.reads_only("teacher", self.pairs.outputs)
        self.regressors = nn.ModuleList(_regressor(s[1], t[1]) for s, t in self.pairs.shapes)
        self.log_scales = nn.ParameterList(nn.Parameter(torch.full((t[1],), start)) for _, t in self.pairs.shapes)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for i, log_scale in enumerate(self.log_scales):
            state_dict.setdefault(f"{prefix}log_scales.{i}", log_scale.detach())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def get_learnable_parameters(self) -> list[nn.Parameter | Group]:
        return [*super().get_learnable_parameters(), *self.regressors.parameters(), *self.log_scales]

    def get_extra_parameters(self) -> int:
        return count_parameters(self.regressors)

    def feature_loss(self, feature_student: Features, feature_teacher: Features) -> Tensor:
        pairs = zip(*self.pairs(feature_student, feature_teacher))
        losses = [
            vid_loss(regressor, log_scale, f_s, f_t, self.eps)
            for regressor, log_scale, (f_s, f_t) in zip(self.regressors, self.log_scales, pairs)
        ]
        return torch.stack(losses).sum()
