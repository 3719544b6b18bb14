"""NORM: two layers within the student widen its last map to N of the teacher's, which one teacher map guides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode as CN

from ..errors import UserError
from ..models.classifier import classified
from ..models.cost import count_parameters
from ..models.parameters import Group
from ..models.trunk import Trunk, parameter_layer
from ..ranges import NOT_NEGATIVE, TEMPERATURE, list_of, whole
from ._base import Distiller, Losses, register
from ._last_map import last_map_classifier
from ._logits import centred
from ._pooling import pool_larger
from ._precision import full_precision
from .facts import image_size_of
from .KD import kd_loss


@full_precision
def norm_loss(expanded: Tensor, f_t: Tensor) -> Tensor:
    """Squared differences of each of the N slices of the expanded student's map and the teacher's last map.

        loss = sum_(n = 1..N) mean_(B, C, H, W)[ (e_n - pool(f_t))^2 ],   e = (e_1, ..., e_N) along the channels

    A larger map of the teacher's is max-pooled to the student's size. A larger one of the student's, which the authors
    do not have, is average-pooled to the teacher's.

    Args:
        expanded: (B, N C, H_s, W_s).
        f_t: (B, C, H_t, W_t).

    Returns:
        () >= 0, the dtype of `expanded`; float32 for half precision.

    Raises:
        ValueError: the maps differ in their images, or one has no multiple of the other's channels.

    Cost: of the expanded map's size.

    Reference: Liu et al. 2023, arXiv 2305.13803, equation 4.
    """
    channels = f_t.shape[1]
    if len(expanded) != len(f_t) or expanded.shape[1] % channels:
        shapes = f"the expanded student's {tuple(expanded.shape)}, the teacher's {tuple(f_t.shape)}"
        raise ValueError(f"NORM needs maps of as many images, and N times the channels: {shapes}")
    expanded = pool_larger(expanded, f_t.shape[-2:])
    if f_t.shape[-2:] != expanded.shape[-2:]:
        f_t = F.adaptive_max_pool2d(f_t, expanded.shape[-2:])
    slices = expanded.unflatten(1, (-1, channels))
    return slices.shape[1] * (slices - f_t.unsqueeze(1)).square().mean()


@full_precision
def scaled_logits(logits: Tensor, scale: float) -> Tensor:
    """Logits (B, C) of mean 0 and of standard deviation `scale` over the classes of each image.

        z' = scale (z - mean_C z) / sqrt(mean_C (z - mean_C z)^2 + 1e-7)

    Equal logits give 0. Classes that are masked out by -inf keep it, and do not count.

    Args:
        scale: 0: the logits as they are.
    """
    if not scale:
        return logits
    own, count = centred(logits)
    variance = own.square().sum(dim=1, keepdim=True) / count.clamp(min=1)
    return (scale * own / (variance + 1e-7).sqrt()).masked_fill(logits == -torch.inf, -torch.inf)


def stage_weight(epoch: int | Tensor, stages: Sequence[int], weights: Sequence[float]) -> float | Tensor:
    """Of the `weights`, the first before epoch `stages[0]`, the second from there to before `stages[1]`, and so on.

    A number for a number, a tensor () for the tensor () that a compiled step gets as its epoch.
    """
    bounds = [0, *stages]
    inside = [(epoch >= low) * (epoch < high) for low, high in zip(bounds, stages)]
    return sum((weight * now for weight, now in zip(weights, inside)), weights[-1] * (epoch >= bounds[-1]))


class NormNetwork(nn.Module):
    """The student with NORM's layers before its pooling: image (B, 3, H, W) -> logits (B, C).

        e = expand(x),   x' = x + contract(e),   logits = classifier of the mean of x'

    Args:
        student: image -> (anything, features), whose map x is the last one or, with `norm`, the last of "feats".
        expand, contract: (B, C_s, H, W) -> (B, N C_t, H, W), and back; each a 1x1 convolution and a BatchNorm.
        norm: a BatchNorm that is between x' and a ReLU before the pooling, as in WRN; None for networks without.
        classifier: the student's, a linear layer or a 1x1 convolution.
    """

    def __init__(
        self, student: nn.Module, expand: nn.Module, contract: nn.Module, norm: nn.Module | None, classifier: nn.Module
    ) -> None:
        super().__init__()
        self.student, self.expand, self.contract = student, expand, contract
        self.norm, self.classifier = norm, classifier

    def widened(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The logits (B, C) and the expanded map e (B, N C_t, H, W)."""
        x = read_map(self.student(image), self.norm)
        expanded = self.expand(x)
        return ended(x + self.contract(expanded), self.norm, self.classifier), expanded

    def forward(self, image: Tensor) -> Tensor:
        return self.widened(image)[0]

    def merged(self) -> MergedNormNetwork:
        """The network with one convolution in the place of the two; its other layers are this network's."""
        layers: list[Any] = [*self.expand.children(), *self.contract.children()]
        conv1, bn1, conv2, bn2 = layers
        (s1, t1), (s2, t2) = _affine(bn1), _affine(bn2)
        w1, w2 = (conv.weight.detach().double().flatten(1) for conv in (conv1, conv2))
        residual = s2[:, None] * (w2 @ (s1[:, None] * w1))
        own = nn.Conv2d(conv1.in_channels, conv2.out_channels, 1).to(conv1.weight)
        with torch.no_grad():
            own.weight.copy_((torch.eye(len(residual)).to(residual) + residual)[..., None, None])
            own.bias.copy_(s2 * (w2 @ t1) + t2)  # type: ignore[union-attr]
        return MergedNormNetwork(self.student, own, self.norm, self.classifier)


class MergedNormNetwork(nn.Module):
    """`NormNetwork` for inference, with its two layers and the residual as one 1x1 convolution: x' = merged(x)."""

    def __init__(self, student: nn.Module, merged: nn.Module, norm: nn.Module | None, classifier: nn.Module) -> None:
        super().__init__()
        self.student, self.merged, self.norm, self.classifier = student, merged, norm, classifier

    def forward(self, image: Tensor) -> Tensor:
        return ended(self.merged(read_map(self.student(image), self.norm)), self.norm, self.classifier)


def read_map(output: Any, norm: nn.Module | str | None) -> Tensor:
    """The map x of a student's output, before the final BatchNorm and ReLU if it has them."""
    features = output[1]
    return features["feats"][-1] if norm else features["last_map"]


def ended(x: Tensor, norm: nn.Module | None, classifier: nn.Module) -> Tensor:
    """The logits (B, C) for the map x' (B, D, H, W)."""
    return classified(x if norm is None else F.relu(norm(x)), classifier)


def _affine(bn: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) float64 of a BatchNorm in eval mode."""
    weight, bias, mean, variance = (t.detach().double() for t in (bn.weight, bn.bias, bn.running_mean, bn.running_var))
    scale = weight / (variance + bn.eps).sqrt()
    return scale, bias - mean * scale


def _layer(channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))


DEFAULTS = CN(
    {
        "N": 8,
        # Both networks' logits are brought to this standard deviation before their losses; 0: they are not.
        "LOGIT_SCALE": 2.5,
        "TEMPERATURE": 4.0,
        # The weight of the maps' loss, b1: the first of the weights before the first of these epochs, and so on.
        "STAGES": [10, 20, 180, 210],
        "STAGE_WEIGHTS": [0.1, 0.5, 1.0, 0.5, 0.1],
        "LOSS": CN({"CE_WEIGHT": 0.125, "FEAT_WEIGHT": 1.0, "KD_WEIGHT": 0.0}),
    }
)

RANGES = {
    "N": whole(1, 256),  # the layers have N times the teacher's channels
    "LOGIT_SCALE": NOT_NEGATIVE,
    "TEMPERATURE": TEMPERATURE,
    "STAGES": list_of(whole(1)),
    "STAGE_WEIGHTS": list_of(NOT_NEGATIVE),
    "LOSS.CE_WEIGHT": NOT_NEGATIVE,
    "LOSS.FEAT_WEIGHT": NOT_NEGATIVE,
    "LOSS.KD_WEIGHT": NOT_NEGATIVE,
}


@register("NORM", DEFAULTS, ranges=RANGES)
class NORM(Distiller):
    """Cross-entropy with the labels, `norm_loss` with the teacher's last map, and `kd_loss` if it has a weight.

    The expanding layers are part of the student from its first step on, between its last map and the pooling, and of
    what is deployed; `merge` makes one convolution of them. In the losses, not in what is deployed, both networks'
    logits are `scaled_logits`. The weight of `norm_loss` follows `stage_weight`; the defaults are those of CIFAR's 240
    epochs.

    Args:
        image_size: of the run.

    Raises:
        UserError: a network does not pool its last map for one linear classifier, or the lists STAGES and STAGE_WEIGHTS
            do not fit.
    """

    needs_run = ("image_size",)
    teacher_outputs = ("logits", "last_map")
    soft_labels = True
    label_weight = "LOSS.CE_WEIGHT"

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN, image_size: int | None = None) -> None:
        super().__init__(student, teacher)
        own = cfg.NORM
        self.logit_scale, self.temperature = own.LOGIT_SCALE, own.TEMPERATURE
        self.ce_loss_weight, self.kd_loss_weight = own.LOSS.CE_WEIGHT, own.LOSS.KD_WEIGHT
        self.feat_loss_weight = own.LOSS.FEAT_WEIGHT
        self.bounds, self.stage_weights = list(own.STAGES), list(own.STAGE_WEIGHTS)
        if len(self.stage_weights) != len(self.bounds) + 1 or self.bounds != sorted(set(self.bounds)):
            raise UserError(
                f"NORM.STAGES {self.bounds} must be growing epochs, and NORM.STAGE_WEIGHTS one weight more than those, "
                f"not {self.stage_weights}"
            )
        if not self.kd_loss_weight:
            self.reads_only("teacher", ("last_map",))
        size = image_size or image_size_of(cfg)
        classifier, (channels_s, *_) = last_map_classifier(student, "student", "NORM", cfg, size)
        _, (channels_t, *_) = last_map_classifier(teacher, "teacher", "NORM", cfg, size)
        self.expand = _layer(channels_s, own.N * channels_t)
        self.contract = _layer(own.N * channels_t, channels_s)
        # The name of the BatchNorm that is between the sum of the last stage and a ReLU before the pooling.
        self._last_norm = name = getattr(student, "last_norm", "")
        image = next(student.parameters()).new_zeros(1, 3, size, size)
        self._trunk = Trunk(student, lambda output: read_map(output, name), image)
        norm = student.get_submodule(name) if name else None
        # In a tuple, as its layers are in the state dict already.
        network = NormNetwork(self._trunk.network, self.expand, self.contract, norm, parameter_layer(classifier))
        self._deployed: tuple[NormNetwork | MergedNormNetwork] = (network,)

    def train(self, mode: bool = True) -> NORM:
        super().train(mode)
        self._follow()
        return self

    def _follow(self) -> None:
        """Take over the student's layers that were exchanged, as by SyncBatchNorm's."""
        self._trunk.follow()
        if self._last_norm:
            self._deployed[0].norm = self.student.get_submodule(self._last_norm)

    def deployments(self) -> dict[str, nn.Module]:
        """The student with the expanding layers; after `merge`, with one convolution in their place."""
        self._follow()
        return {"norm": self._deployed[0]}

    def merge(self) -> None:
        if isinstance(self._deployed[0], NormNetwork):
            self._deployed = (self._deployed[0].merged(),)

    def get_learnable_parameters(self) -> list[nn.Parameter | Group]:
        return [*super().get_learnable_parameters(), *self.expand.parameters(), *self.contract.parameters()]

    def get_extra_parameters(self) -> int:
        """Those of the expanding layers, which are deployed too."""
        return count_parameters(self.expand) + count_parameters(self.contract)

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, Losses]:
        network: Any = self._deployed[0]
        logits_student, expanded = network.widened(image)
        logits_teacher, features_teacher = self.teacher_forward(image)
        scaled = scaled_logits(logits_student, self.logit_scale)
        weight = self.feat_loss_weight * stage_weight(kwargs["epoch"], self.bounds, self.stage_weights)
        losses = {
            "loss_ce": self.ce_loss_weight * self.cross_entropy(scaled, target, **kwargs),
            "loss_feat": weight * norm_loss(expanded, features_teacher["last_map"]),
        }
        if self.kd_loss_weight:
            taught = scaled_logits(logits_teacher, self.logit_scale)
            losses["loss_kd"] = self.kd_loss_weight * kd_loss(scaled, taught, self.temperature)
        return scaled, losses
