"""PKT as its equations read, pair by pair, in 50 digits; its gradient by central differences."""

from __future__ import annotations

import mpmath
import torch
from torch import Tensor

DIGITS = 50
STEP = mpmath.mpf(10) ** -20


def naive_pkt_loss(f_s: list[list[mpmath.mpf]], f_t: list[list[mpmath.mpf]], eps: mpmath.mpf) -> mpmath.mpf:
    batch = len(f_s)

    def neighbours(f):
        lengths = [mpmath.sqrt(sum(x**2 for x in row)) for row in f]
        unit = [[x / (length + eps) for x in row] for row, length in zip(f, lengths)]
        kernel = [[(sum(x * y for x, y in zip(a, b)) + 1) / 2 for b in unit] for a in unit]
        return [[k / sum(row) for k in row] for row in kernel]

    p_s, p_t = neighbours(f_s), neighbours(f_t)
    terms = [
        p_t[i][j] * mpmath.log((p_t[i][j] + eps) / (p_s[i][j] + eps)) for i in range(batch) for j in range(batch)
    ]
    return sum(terms) / batch**2


def exact_pkt(f_s: Tensor, f_t: Tensor, eps: float = 1e-7) -> tuple[Tensor, Tensor]:
    """The loss () and its gradient by f_s (B, D), exact to float64's last digit."""
    with mpmath.workdps(DIGITS):
        student, teacher = ([[mpmath.mpf(x) for x in row] for row in f.tolist()] for f in (f_s, f_t))
        small = mpmath.mpf(eps)
        value = naive_pkt_loss(student, teacher, small)
        gradient = torch.zeros_like(f_s)
        for i, row in enumerate(student):
            for j, x in enumerate(row):
                sides = []
                for row[j] in (x + STEP, x - STEP):
                    sides.append(naive_pkt_loss(student, teacher, small))
                row[j] = x
                gradient[i, j] = float((sides[0] - sides[1]) / (2 * STEP))
        return f_s.new_tensor(float(value)), gradient
