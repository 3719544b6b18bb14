"""DKD directly from its equations, sample by sample."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_dkd_loss(
    logits_student: Tensor, logits_teacher: Tensor, target: Tensor, alpha: float, beta: float, temperature: float
) -> Tensor:
    total = logits_student.new_zeros(())
    for z_s, z_t, y in zip(logits_student, logits_teacher, target.tolist()):
        p_s, p_t = torch.softmax(z_s / temperature, dim=0), torch.softmax(z_t / temperature, dim=0)
        others = [c for c in range(len(z_s)) if c != y]
        rest_s, rest_t = p_s[others].sum(), p_t[others].sum()
        tckd = p_t[y] * torch.log(p_t[y] / p_s[y]) + rest_t * torch.log(rest_t / rest_s)
        q_s, q_t = p_s[others] / rest_s, p_t[others] / rest_t
        nckd = (q_t * torch.log(q_t / q_s)).sum()
        total = total + alpha * tckd + beta * nckd
    return temperature**2 * total / len(target)
