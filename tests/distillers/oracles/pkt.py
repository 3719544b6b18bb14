"""PKT as its equations read, pair by pair."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_pkt_loss(f_s: Tensor, f_t: Tensor, eps: float = 1e-7) -> Tensor:
    batch = len(f_s)

    def neighbours(f: Tensor) -> list[list[Tensor]]:
        unit = [row / (row.pow(2).sum().sqrt() + eps) for row in f]
        kernel = [[((a * b).sum() + 1) / 2 for b in unit] for a in unit]
        return [[k / sum(row) for k in row] for row in kernel]

    p_s, p_t = neighbours(f_s), neighbours(f_t)
    terms = [
        p_t[i][j] * torch.log((p_t[i][j] + eps) / (p_s[i][j] + eps)) for i in range(batch) for j in range(batch)
    ]
    return torch.stack(terms).mean()
