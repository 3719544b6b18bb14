"""NST directly from its equations: the kernel of every pair of channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def naive_mean_kernel(a: Tensor, b: Tensor) -> Tensor:
    """mean of (a . b)^2, through the (B, C_a, C_b, HW) tensor."""
    return (a.unsqueeze(2) * b.unsqueeze(1)).sum(dim=3).pow(2).mean()


def naive_single_stage_nst_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    size = min(tuple(f_s.shape[2:]), tuple(f_t.shape[2:]))
    s, t = (F.normalize(F.adaptive_avg_pool2d(f, size).flatten(2), dim=2) for f in (f_s, f_t))
    return naive_mean_kernel(s, s) - 2 * naive_mean_kernel(s, t) + naive_mean_kernel(t, t)


def naive_nst_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> Tensor:
    return torch.stack([naive_single_stage_nst_loss(f_s, f_t) for f_s, f_t in zip(g_s, g_t)]).sum()
