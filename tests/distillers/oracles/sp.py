"""SP directly from its equations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def naive_similarity_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    batch = len(f_s)
    total = f_s.new_zeros(())
    rows_s, rows_t = f_s.reshape(batch, -1), f_t.reshape(batch, -1)
    for i in range(batch):
        row_s = torch.stack([(rows_s[i] * rows_s[j]).sum() for j in range(batch)])
        row_t = torch.stack([(rows_t[i] * rows_t[j]).sum() for j in range(batch)])
        total = total + (row_t / row_t.norm() - row_s / row_s.norm()).pow(2).sum()
    return total / batch**2


def naive_sp_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> Tensor:
    return torch.stack([naive_similarity_loss(f_s, f_t) for f_s, f_t in zip(g_s, g_t)]).sum()
