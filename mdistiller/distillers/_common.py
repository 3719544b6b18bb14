"""What two or more methods share: the feature-shape probe, the convolutional regressor, spatial alignment."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


@contextmanager
def evaluating(*modules: nn.Module):
    """Eval mode without gradients for `modules`; each submodule gets its own mode back afterwards."""
    modes = [(m, m.training) for module in modules for m in module.modules()]
    try:
        for module in modules:
            module.eval()
        with torch.no_grad():
            yield
    finally:
        for m, mode in modes:
            m.training = mode


def probe(model: nn.Module, input_size: Sequence[int]) -> tuple[Tensor, dict[str, Any]]:
    """The model's output for one zero image of (height, width) = `input_size`.

    In eval mode: a probe in training mode would move the BatchNorm statistics of a pretrained teacher.
    """
    like = next(model.parameters())
    with evaluating(model):
        return model(like.new_zeros(1, 3, *input_size))


def get_feat_shapes(
    student: nn.Module, teacher: nn.Module, input_size: Sequence[int]
) -> tuple[list[torch.Size], list[torch.Size]]:
    """Shapes (1, C, H, W) of the feature maps of student and teacher, stage by stage.

    Args:
        input_size: (height, width) of the images.
    """
    return tuple([f.shape for f in probe(m, input_size)[1]["feats"]] for m in (student, teacher))  # type: ignore[return-value]


class ConvReg(nn.Module):
    """Convolution, BatchNorm and (by default) ReLU that bring a student's map to the shape of the teacher's.

    Args:
        s_shape: the student's (B, C, H, W).
        t_shape: the teacher's (B, C, H, W). Its height may be half, twice, or at most the student's.
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


def count_parameters(module: nn.Module) -> int:
    """Number of parameters of `module`."""
    return sum(p.numel() for p in module.parameters())
