"""DKD directly from its equations, sample by sample."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_kl(p_t: Tensor, p_s: Tensor) -> Tensor:
    """Of two distributions (C,); classes to which the teacher gives probability 0 are dropped."""
    return sum((t * torch.log(t / s) for t, s in zip(p_t, p_s) if t > 0), p_s.new_zeros(()))


def naive_dkd_loss(
    logits_student: Tensor, logits_teacher: Tensor, target: Tensor, alpha: float, beta: float, temperature: float
) -> Tensor:
    total = logits_student.new_zeros(())
    for z_s, z_t, y in zip(logits_student, logits_teacher, target.tolist()):
        p_s, p_t = torch.softmax(z_s / temperature, dim=0), torch.softmax(z_t / temperature, dim=0)
        others = [c for c in range(len(z_s)) if c != y]
        rest_s, rest_t = p_s[others].sum(), p_t[others].sum()
        tckd = naive_kl(torch.stack([p_t[y], rest_t]), torch.stack([p_s[y], rest_s]))
        total = total + alpha * tckd
        if rest_t > 0:
            total = total + beta * naive_kl(p_t[others] / rest_t, p_s[others] / rest_s)
    return temperature**2 * total / len(target)
