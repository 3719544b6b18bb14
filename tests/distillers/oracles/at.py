"""AT directly from its equations, image by image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def naive_single_stage_at_loss(f_s: Tensor, f_t: Tensor, p: float) -> Tensor:
    size = min(tuple(f_s.shape[2:]), tuple(f_t.shape[2:]))
    f_s, f_t = F.adaptive_avg_pool2d(f_s, size), F.adaptive_avg_pool2d(f_t, size)
    squares = []
    for image_s, image_t in zip(f_s, f_t):
        a_s, a_t = (sum(channel.abs() ** p for channel in image) / len(image) for image in (image_s, image_t))
        squares.append((a_s / a_s.norm() - a_t / a_t.norm()) ** 2)
    return torch.stack(squares).mean()


def naive_at_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor], p: float) -> Tensor:
    return torch.stack([naive_single_stage_at_loss(f_s, f_t, p) for f_s, f_t in zip(g_s, g_t)]).sum()
