"""Factor transfer: the student's translated map agrees with a paraphrase of the teacher's, learnt before training."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode as CN

from ..models.cost import count_parameters
from ..models.parameters import Group
from ..ranges import NOT_NEGATIVE, POSITIVE, interval, whole
from ._base import FeatureDistiller, Features, Losses, register
from ._feature_maps import MapPairs, align
from ._precision import full_precision
from .stages import Stage


@full_precision
def ft_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    """Mean absolute difference of the two networks' normalised factors.

        loss = mean_(B, HW)[ |F_s - F_t| ],   F = A / |A|_2 over HW,   A = mean_C f^2

    Args:
        f_s: the translated map of the student (B, C_s, H_s, W_s).
        f_t: the paraphrased map of the teacher (B, C_t, H_t, W_t); if the sizes differ, the larger is average-pooled to
            the smaller.

    Returns:
        () in [0, 1], the student's dtype; float32 for half precision.

    Reference: Kim et al. 2018, arXiv 1802.04977, equation 3 with p = 1.
    """
    return (factor(f_s, f_t) - factor(f_t, f_s)).abs().mean()


def factor(f: Tensor, other: Tensor) -> Tensor:
    """The factor (B, HW) of a map `f`, in the size of the smaller of both maps."""
    return F.normalize(align(f, other)[0].square().mean(dim=1).flatten(1), dim=1)


@full_precision
def reconstruction_loss(f: Tensor, target: Tensor) -> Tensor:
    """mean[ (f - target)^2 ], two maps of one shape: ()."""
    return F.mse_loss(f, target)


def _layers(conv: type[nn.Module], widths: tuple[int, ...], norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """3x3 convolutions from each width to the next, each with a norm and LeakyReLU of slope 0.1."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [conv(before, after, 3, 1, 1), norm(after), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)


def _no_norm(width: int) -> nn.Module:
    return nn.Identity()


class Paraphraser(nn.Module):
    """An autoencoder of the teacher's map: `encoder` to `width` channels, `decoder` back."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.encoder = _layers(nn.Conv2d, (channels, channels, width, width), _no_norm)
        self.decoder = _layers(nn.ConvTranspose2d, (width, width, channels, channels), _no_norm)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> its reconstruction."""
        return self.decoder(self.encoder(x))  # type: ignore[no-any-return]


class Translator(nn.Module):
    """The same convolutions as the paraphraser's `encoder` on the student's map, each followed by a BatchNorm."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.encoder = _layers(nn.Conv2d, (channels, channels, width, width), nn.BatchNorm2d)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, width, H, W)."""
        return self.encoder(x)  # type: ignore[no-any-return]


DEFAULTS = CN(
    {
        # Epochs of the paraphraser's stage, and their learning rate.
        "INIT_EPOCHS": 30,
        "INIT_LR": 0.01,
        # Channels of the factors as a share of those of the teacher's map.
        "K": 0.5,
        "LOSS": CN({"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 200.0}),
    }
)


RANGES = {
    "INIT_EPOCHS": whole(0),  # 0 for a paraphraser whose weights are loaded
    "INIT_LR": POSITIVE,
    "K": interval(0, 4, "(]"),
    "LOSS.CE_WEIGHT": NOT_NEGATIVE,
    "LOSS.FEAT_WEIGHT": NOT_NEGATIVE,
}


@register("FT", DEFAULTS, ranges=RANGES)
class FT(FeatureDistiller):
    """A stage in which a paraphraser learns to reconstruct the teacher's map; then cross-entropy and `ft_loss`.

    In the stage, INIT_EPOCHS epochs with the learning rate INIT_LR, the student does not learn. Afterwards the
    paraphraser is frozen in eval mode, and a translator of the student's map is trained with the student. The maps are
    the last ones, or those of a pair in DISTILLER.PAIRS.

    Args:
        image_size: of the run.

    Raises:
        UserError: there is no pair of maps, or DISTILLER.PAIRS names several.
    """

    needs_run = ("image_size",)
    teacher_outputs = ("feats",)
    compares_maps = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN, image_size: int | None = None) -> None:
        super().__init__(student, teacher, cfg.FT)
        self.init_epochs, self.init_lr = cfg.FT.INIT_EPOCHS, cfg.FT.INIT_LR
        self.pairs = MapPairs.probed(student, teacher, cfg, image_size, "FT")
        self.pairs.keep_one("FT")
        self.reads_only("teacher", self.pairs.outputs)
        ((shape_s, shape_t),) = self.pairs.shapes
        width = max(int(shape_t[1] * cfg.FT.K), 1)
        self.paraphraser = Paraphraser(shape_t[1], width).requires_grad_(False)  # trained in the stage alone
        self.translator = Translator(shape_s[1], width)

    def train(self, mode: bool = True) -> FT:
        super().train(mode)
        if self.stage_on is None:
            self.paraphraser.eval()
        return self

    def get_learnable_parameters(self) -> list[nn.Parameter | Group]:
        return [*super().get_learnable_parameters(), *self.translator.parameters()]

    def get_extra_parameters(self) -> int:
        return count_parameters(self.translator)

    def stages(self) -> tuple[Stage, ...]:
        learnable = list(self.paraphraser.parameters())
        return (Stage("paraphraser", self.init_epochs, learnable, self.reconstruct, lr=self.init_lr),)

    def reconstruct(self, image: Tensor, target: Tensor, **kwargs: Any) -> Losses:
        """The stage's loss."""
        f_t = self._teachers(self.teacher_forward(image)[1])
        return {"loss_reconstruction": reconstruction_loss(self.paraphraser(f_t), f_t)}

    def _teachers(self, features: Features) -> Tensor:
        """The teacher's map."""
        (pair,) = self.pairs.indices
        return features[self.pairs.kinds[1]][pair[1]]  # type: ignore[no-any-return]

    def feature_loss(self, feature_student: Features, feature_teacher: Features) -> Tensor:
        (f_s,), (f_t,) = self.pairs(feature_student, feature_teacher)
        with torch.no_grad():
            paraphrased = self.paraphraser.encoder(f_t)
        return ft_loss(self.translator(f_s), paraphrased)
