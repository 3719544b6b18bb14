"""Overhaul of feature distillation: match the teacher's maps before the ReLU, loosely where they are negative."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from yacs.config import CfgNode as CN

from ..console import network_name
from ..errors import UserError
from ..models.cost import count_parameters
from ..models.parameters import Group
from ..ranges import NOT_NEGATIVE, ODD
from ._base import FeatureDistiller, Features, register
from ._feature_maps import MapPairs
from ._pooling import average_pool
from ._precision import full_precision


@full_precision
def feat_loss(source: Tensor, target: Tensor, margin: Tensor) -> Tensor:
    """Partial L2 distance: where the margin-ReLU of the teacher is negative, only a student above it is penalised.

        loss = 1/B * sum[ 0 if s <= g <= 0 else (s - g)^2 ],   g = max(t, margin)

    Args:
        source: the student's s (B, C, H, W).
        target: the teacher's t (B, C, H, W), before its ReLU; gets no gradient.
        margin: (1, C, 1, 1), negative; see `feature_margin`.

    Returns:
        () >= 0, a sum over C, H and W; the student's dtype, float32 for half precision.

    Raises:
        ValueError: student and teacher differ in shape.

    Cost: one tensor of the maps' size is kept for the backward pass.

    Reference: Heo et al. 2019, arXiv 1904.01866, section 3.
    """
    if source.shape != target.shape:
        shapes = f"the student's {tuple(source.shape)}, the teacher's {tuple(target.shape)}"
        raise ValueError(f"OFD needs maps of the same shape: {shapes}")
    return _PartialL2.apply(source, target, margin.to(source))


class _PartialL2(torch.autograd.Function):
    """The gradient is twice the difference that the loss squares, so only that difference is kept."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, target: Tensor, margin: Tensor) -> Tensor:  # type: ignore[override]
        goal = torch.maximum(target, margin)
        diff = source - goal
        # 1 where the student is above the goal or the goal above 0, else 0; in place as floats, faster than with bools.
        diff *= torch.maximum(goal, diff, out=goal).gt_(0)
        ctx.save_for_backward(diff)
        # Summed map by map, as one long sum would lose precision in float32.
        return torch.linalg.vector_norm(diff.flatten(2), dim=2).square().sum() / len(diff)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (diff,) = ctx.saved_tensors
        return diff * (grad * 2 / len(diff)), None, None


def feature_margin(bn: nn.BatchNorm2d) -> Tensor:
    """Each channel's margin: the mean of the negative outputs of a BatchNorm, assuming that its outputs are Gaussian.

        margin = E[x | x < 0] = m - s * phi(m/s) / Phi(-m/s),   x ~ N(m, s^2),   m = bias, s = |weight|

    Args:
        bn: with C channels, as `teacher.get_bn_before_relu()` returns it.

    Returns:
        (1, C, 1, 1), <= 0, the dtype of `bn`. A channel that is never negative gets the limit, -s^2/m; one
        with s = 0 gets min(m, 0).

    Reference: Heo et al. 2019, arXiv 1904.01866, section 3.
    """
    mean = bn.bias.detach().double()
    std = bn.weight.detach().double().abs().clamp(min=torch.finfo(torch.float64).tiny)
    ratio = mean / std
    # phi / Phi by the scaled complementary error function, in which their common factor exp(-x^2/2) cancels.
    margin = mean - std * math.sqrt(2 / math.pi) / torch.special.erfcx(ratio / math.sqrt(2))
    # For a large ratio the two terms cancel; this series is their difference.
    far = -std * (1 / ratio - 2 / ratio**3)
    return torch.where(ratio > 1e3, far, margin).to(bn.weight.dtype).view(1, -1, 1, 1)


class ConnectorConvBN(nn.Module):
    """One convolution and BatchNorm for each stage, from the student's number of channels to the teacher's."""

    def __init__(self, s_channels: Sequence[int], t_channels: Sequence[int], kernel_size: int = 1) -> None:
        super().__init__()
        self.connectors = nn.ModuleList(_connector(s, t, kernel_size) for s, t in zip(s_channels, t_channels))

    def forward(self, g_s: Sequence[Tensor]) -> list[Tensor]:
        return [connector(f_s) for connector, f_s in zip(self.connectors, g_s)]


def _connector(s_channels: int, t_channels: int, kernel_size: int) -> nn.Sequential:
    conv = nn.Conv2d(s_channels, t_channels, kernel_size, padding=(kernel_size - 1) // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(t_channels))


DEFAULTS = CN({"CONNECTOR": CN({"KERNEL_SIZE": 1}), "LOSS": CN({"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 0.001})})


RANGES = {
    "CONNECTOR.KERNEL_SIZE": replace(ODD, most=63),
    "LOSS.CE_WEIGHT": NOT_NEGATIVE,
    "LOSS.FEAT_WEIGHT": NOT_NEGATIVE,
}


@register("OFD", DEFAULTS, ranges=RANGES)
class OFD(FeatureDistiller):
    """Cross-entropy with the labels and `feat_loss` over the last stages, each with half the weight of the next.

    The stages are paired by `MapPairs`, as many as the teacher returns BatchNorms for. The teacher's maps are
    average-pooled to the student's size. Of the teacher only the BatchNorms are in training mode; dropout stays off.

    Args:
        image_size: of the run.

    Raises:
        UserError: the teacher has no BatchNorms before the ReLU, or they differ in channels from its stages, or there
            is no stage to pair.
    """

    needs_run = ("image_size",)
    teacher_outputs = ("preact_feats",)
    compares_maps = True
    # As in the paper's code: the targets are normalised by the statistics of the batch.
    teacher_in_train_mode = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CN, image_size: int | None = None) -> None:
        super().__init__(student, teacher, cfg.OFD)
        kinds = ("preact_feats", "preact_feats")
        self.pairs = MapPairs.probed(student, teacher, cfg, image_size, "OFD", kinds=kinds)
        bns = _paired_batchnorms(student, teacher, self.pairs)
        channels_s, channels_t = ([shape[1] for shape in shapes] for shapes in zip(*self.pairs.shapes))
        self.connectors = ConnectorConvBN(channels_s, channels_t, cfg.OFD.CONNECTOR.KERNEL_SIZE)
        for i, bn in enumerate(bns):
            # Buffers, so that they move with the module; not saved, as they are computed from the teacher.
            self.register_buffer(f"margin{i}", feature_margin(bn), persistent=False)

    @property
    def margins(self) -> list[Tensor]:
        """(1, C, 1, 1) for each paired stage."""
        return [self.get_buffer(f"margin{i}") for i in range(len(self.connectors.connectors))]

    def train(self, mode: bool = True) -> OFD:
        """Of the teacher, the network itself and its BatchNorms get the mode; all its other layers evaluate."""
        super().train(mode)
        for layer in self.teacher.modules():
            layer.training = mode and (layer is self.teacher or isinstance(layer, _BATCHNORMS))
        return self

    def teacher_forward(self, image: Tensor) -> tuple[Tensor, Features]:
        """As in the base class, but the teacher's buffers do not change: training mode would update them."""
        with torch.no_grad():
            return functional_call(self.teacher, _instead_of_buffers(self.teacher), (image,))

    def get_learnable_parameters(self) -> list[nn.Parameter | Group]:
        return super().get_learnable_parameters() + list(self.connectors.parameters())

    def get_extra_parameters(self) -> int:
        return count_parameters(self.connectors)

    def feature_loss(self, feature_student: Features, feature_teacher: Features) -> Tensor:
        maps_s, maps_t = self.pairs(feature_student, feature_teacher)
        g_s = self.connectors(maps_s)
        loss = g_s[0].new_zeros(())
        for f_s, f_t, margin in zip(g_s, maps_t, self.margins):
            height, width = f_s.shape[-2:]
            loss = loss / 2 + feat_loss(f_s, average_pool(f_t, (height, width)), margin)
        return loss


_BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _instead_of_buffers(network: nn.Module) -> dict[str, Any]:
    """What a step in training mode uses for each buffer of `network`, by name: a copy, or None for BatchNorm's.

    In training mode BatchNorm reads none of its buffers; without them it updates none. On a GPU, copies of them and
    their updates would be 228 kernels a step for resnet56.
    """
    unread: set[str] = set()
    for name, layer in network.named_modules():
        if type(layer) in _BATCHNORMS and layer.training:
            unread.update(own for own, _ in layer.named_buffers(prefix=name, recurse=False))
    # A buffer of two layers is named once, as functional_call asks.
    return {name: None if name in unread else buffer.clone() for name, buffer in network.named_buffers()}


def _paired_batchnorms(student: nn.Module, teacher: nn.Module, pairs: MapPairs) -> list[nn.BatchNorm2d]:
    """The BatchNorm before the ReLU of each pair's map of the teacher; keeps the pairs that have one.

    As in the original, there are also no more pairs than stages that both networks list in `get_stage_channels()`, of
    which the first does not count.

    Raises:
        UserError: see `OFD`.
    """
    bns = _batchnorms(student, teacher)
    pairs.keep_deepest(len(bns), "OFD", f"{network_name(teacher)} has {len(bns)} BatchNorms before the ReLU")
    listed = [len(net.get_stage_channels()) - 1 for net in (student, teacher) if hasattr(net, "get_stage_channels")]  # type: ignore[operator]
    if listed and not pairs.configured:
        pairs.keep_deepest(min(listed), "OFD", "get_stage_channels() lists no stage")
    paired = [bns[j - pairs.counts[1]] for _, j in pairs.indices]  # the last BatchNorm belongs to the last map
    widths = [len(bn.weight) for bn in paired]
    channels_s, channels_t = ([shape[1] for shape in shapes] for shapes in zip(*pairs.shapes))
    if widths != channels_t:
        raise UserError(
            f"OFD cannot pair the stages: {channels_s} channels in the student, {channels_t} in the teacher, but the "
            f"teacher's BatchNorms before the ReLU have {widths}"
        )
    return paired


def _batchnorms(student: nn.Module, teacher: nn.Module) -> list[nn.BatchNorm2d]:
    """The teacher's BatchNorms before the ReLU, by stage; the last belongs to its last map."""
    name = network_name(teacher)
    if not hasattr(teacher, "get_bn_before_relu"):
        raise UserError(f"OFD needs a teacher with get_bn_before_relu(), its stages' last BatchNorms; {name} has none")
    try:
        return teacher.get_bn_before_relu()  # type: ignore[operator, no-any-return]
    except UserError as error:
        raise UserError(f"the student {network_name(student)} cannot learn by OFD: {error}") from None
