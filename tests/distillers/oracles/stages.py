"""CC, ICKD, FT, AB and FSP by plain loops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def naive_cc_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    total, neighbours = 0 * f_s.sum(), len(f_s) - 1
    for i in range(neighbours):
        for d in range(f_s.shape[1]):
            total = total + (f_s[i, d] - f_t[i, d]).abs() * (f_s[i + 1, d] - f_t[i + 1, d]).abs()
    return total / neighbours if neighbours else total


def naive_ickd_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    total = f_s.new_zeros(())
    for x_s, x_t in zip(f_s, f_t):
        for c in range(len(x_s)):
            rows = [torch.stack([(x[c] * other).sum() for other in x]) for x in (x_s, x_t)]
            row_s, row_t = (row / row.norm().clamp(min=1e-12) for row in rows)
            total = total + sum((a - b) ** 2 for a, b in zip(row_s, row_t))
    return total / (f_s.shape[0] * f_s.shape[1])


def naive_ft_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    """Maps of one size."""
    total, cells = f_s.new_zeros(()), math.prod(f_s.shape[2:])
    for x_s, x_t in zip(f_s, f_t):
        factors = [sum(channel**2 for channel in x) / len(x) for x in (x_s, x_t)]
        one, other = (factor / factor.norm() for factor in factors)
        total = total + (one - other).abs().sum() / cells
    return total / len(f_s)


def naive_ab_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor], margin: float = 1.0) -> Tensor:
    total = g_s[0].new_zeros(())
    for i, (f_s, f_t) in enumerate(zip(g_s, g_t)):
        own = f_s.new_zeros(())
        for s, t in zip(f_s.flatten(), f_t.flatten()):
            if t > 0 and s <= margin:
                own = own + (s - margin) ** 2
            elif t <= 0 and s > -margin:
                own = own + (s + margin) ** 2
        total = total + own / len(f_s) * 3 / 1000 * 2.0 ** (i - len(g_s) + 1)
    return total


def naive_fsp_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> Tensor:
    """Maps of one size."""

    def matrix(lower: Tensor, upper: Tensor) -> Tensor:
        cells = math.prod(lower.shape[2:])
        return torch.stack(
            [torch.stack([torch.stack([(c * d).sum() / cells for d in b]) for c in a]) for a, b in zip(lower, upper)]
        )

    total = g_s[0].new_zeros(())
    for i in range(len(g_s) - 1):
        total = total + (matrix(g_s[i], g_s[i + 1]) - matrix(g_t[i], g_t[i + 1])).square().mean()
    return total
