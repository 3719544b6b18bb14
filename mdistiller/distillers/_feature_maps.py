"""Feature maps of student and teacher: shapes, pairs of stages, and regressors from the student's to the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..models.eval_mode import eval_mode
from ._base import Features

T = TypeVar("T")


def probe(model: nn.Module, input_size: Sequence[int]) -> tuple[Tensor, dict[str, Any]]:
    """The model's output for one zero image of (height, width) = `input_size`.

    It runs in eval mode: in training mode it would update the BatchNorm statistics of a pretrained teacher.
    """
    like = next(model.parameters())
    with eval_mode(model):
        return model(like.new_zeros(1, 3, *input_size))


def get_feat_shapes(
    student: nn.Module, teacher: nn.Module, input_size: Sequence[int]
) -> tuple[list[torch.Size], list[torch.Size]]:
    """Shapes (1, C, H, W) of the feature maps of student and teacher, stage by stage.

    Args:
        input_size: (height, width) of the images.
    """
    return tuple([f.shape for f in probe(m, input_size)[1]["feats"]] for m in (student, teacher))  # type: ignore[return-value]


def probe_pair(student: nn.Module, teacher: nn.Module) -> tuple[Features, Features]:
    """Features of both networks for one zero image of the smallest usual size that both accept: 32, 64 or 224."""
    for size in (32, 64):
        try:
            return probe(student, (size, size))[1], probe(teacher, (size, size))[1]
        except RuntimeError:  # an ImageNet network may downsample a 32x32 image to nothing
            continue
    return probe(student, (224, 224))[1], probe(teacher, (224, 224))[1]


def get_stage_shapes(student: nn.Module, teacher: nn.Module) -> tuple[list[torch.Size], list[torch.Size]]:
    """`get_feat_shapes` for a method whose config names no image size, by `probe_pair`."""
    return tuple([f.shape for f in features["feats"]] for features in probe_pair(student, teacher))  # type: ignore[return-value]


def pair_stages(feats_s: Sequence[T], feats_t: Sequence[T]) -> list[tuple[T, T]]:
    """(student's, teacher's) entry for each stage after the stem, shallow to deep.

    `feats[0]` is the stem's map. A network that lists none (ImageNet's MobileNetV1) has one entry less than its
    partner; its stages are then paired from the deepest up.
    """
    stages = max(len(feats_s), len(feats_t)) - 1
    return list(zip(feats_s[-stages:], feats_t[-stages:]))


def require_maps(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], method: str, same_size: bool = False
) -> None:
    """Refuse (student's, teacher's) shapes that are not both (B, C, H, W), with equal (H, W) if `same_size`.

    Raises:
        ValueError: names the method and both shapes.
    """
    for shape_s, shape_t in pairs:
        shapes = f"the student's {tuple(shape_s)}, the teacher's {tuple(shape_t)}"
        if len(shape_s) != 4 or len(shape_t) != 4:
            raise ValueError(f"{method} compares feature maps (B, C, H, W), these are not both maps: {shapes}")
        if same_size and shape_s[2:] != shape_t[2:]:
            raise ValueError(f"{method} needs maps of the same height and width: {shapes}")


def require_paired_maps(
    shapes_s: Sequence[Sequence[int]], shapes_t: Sequence[Sequence[int]], method: str, same_size: bool = False
) -> None:
    """Refuse networks whose feature maps cannot be compared stage by stage, as `pair_stages` pairs them.

    Args:
        shapes_s: of every entry of the student's `feats`, the stem included.
        shapes_t: the teacher's.
        method: for the message.
        same_size: the maps of a pair must have the same height and width; for a method that does not `align` them.

    Raises:
        ValueError: different numbers of stages, or see `require_maps`; names the method and both networks' shapes.
    """
    pairs = pair_stages(shapes_s, shapes_t)
    # One entry less means a missing stem only if all stages have the same sizes as the other network's.
    stemless = abs(len(shapes_s) - len(shapes_t)) == 1 and all(s[2:] == t[2:] for s, t in pairs)
    if len(shapes_s) != len(shapes_t) and not stemless:
        listed = [", ".join(str(tuple(s)) for s in shapes) for shapes in (shapes_s, shapes_t)]
        raise ValueError(
            f"{method} pairs the networks stage by stage, but they differ in their number of stages; "
            f"student: {listed[0]}; teacher: {listed[1]}"
        )
    require_maps(pairs, method, same_size)


class ConvReg(nn.Module):
    """Convolution, BatchNorm and (by default) ReLU that bring a student's map to the shape of the teacher's.

    Args:
        s_shape: the student's (B, C, H, W).
        t_shape: the teacher's (B, C, H, W): half or twice the student's height, or no larger than the student's map.
        use_relu: end with a ReLU.

    Raises:
        ValueError: the teacher's map is larger, but not exactly twice as high.

    Reference: FitNets, Romero et al. 2015, arXiv 1412.6550, section 2.2.
    """

    def __init__(self, s_shape: Sequence[int], t_shape: Sequence[int], use_relu: bool = True) -> None:
        super().__init__()
        (_, s_channels, s_h, s_w), (_, t_channels, t_h, t_w) = s_shape, t_shape
        self.use_relu = use_relu
        self.conv: nn.Module
        if s_h == 2 * t_h:
            self.conv = nn.Conv2d(s_channels, t_channels, kernel_size=3, stride=2, padding=1)
        elif 2 * s_h == t_h:
            self.conv = nn.ConvTranspose2d(s_channels, t_channels, kernel_size=4, stride=2, padding=1)
        elif s_h >= t_h and s_w >= t_w:
            self.conv = nn.Conv2d(s_channels, t_channels, kernel_size=(1 + s_h - t_h, 1 + s_w - t_w))
        else:
            raise ValueError(
                f"no regressor from a student map of {tuple(s_shape)} to a teacher map of {tuple(t_shape)}: "
                "the teacher's must be half as high, twice as high, or no larger"
            )
        self.bn = nn.BatchNorm2d(t_channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_student, H, W) -> (B, C_teacher, H', W')."""
        x = self.bn(self.conv(x))
        return self.relu(x) if self.use_relu else x


def align(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the larger of two maps (B, C, H, W) to the height and width of the smaller."""
    if a.shape[-2] > b.shape[-2]:
        return F.adaptive_avg_pool2d(a, b.shape[-2:]), b  # type: ignore[arg-type]
    if a.shape[-2] < b.shape[-2]:
        return a, F.adaptive_avg_pool2d(b, a.shape[-2:])  # type: ignore[arg-type]
    return a, b
