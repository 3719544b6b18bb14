"""The losses as usually written, formula by formula in torch operations: the baseline of benchmarks/losses.py.

Each has the arguments, value and gradients of its counterpart in `mdistiller.distillers`; benchmarks/losses.py checks
that before it measures.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Maps = Sequence[Tensor]


def naive_at(g_s: Maps, g_t: Maps, p: float = 2) -> Tensor:
    """Student and teacher maps have the same size, as in all functions of this file."""

    def attention(f: Tensor) -> Tensor:
        return F.normalize(f.pow(p).mean(1).flatten(1))

    return torch.stack([(attention(f_s) - attention(f_t)).pow(2).mean() for f_s, f_t in zip(g_s, g_t)]).sum()


def naive_nst(g_s: Maps, g_t: Maps) -> Tensor:
    """Every pair of channels is multiplied pixel by pixel: (B, C, C, HW)."""

    def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.unsqueeze(1) * b.unsqueeze(2)).sum(-1).pow(2).mean()

    loss = torch.zeros(())
    for f_s, f_t in zip(g_s, g_t):
        s, t = F.normalize(f_s.flatten(2), dim=2), F.normalize(f_t.flatten(2), dim=2)
        loss = loss + mean_kernel(t, t) + mean_kernel(s, s) - 2 * mean_kernel(s, t)
    return loss


def naive_kdsvd(g_s: Maps, g_t: Maps, k: int) -> Tensor:
    """A singular value decomposition of every map. Signs as in kdsvd_loss, so that the values can be compared."""

    def decompose(f: Tensor, n: int) -> tuple[Tensor, Tensor]:
        _, sigma, vh = torch.linalg.svd(f.flatten(1, 2), full_matrices=False)
        v = vh.mT[:, :, :n]
        return v * torch.where(v.sum(1, keepdim=True) < 0, -1, 1), sigma[:, :n]

    loss, before = torch.zeros(()), None
    for f_s, f_t in zip(g_s, g_t):
        v_t, sigma = decompose(f_t, k)
        v_s, _ = decompose(f_s, k + 3)
        cosine = v_s.detach().mT @ v_t
        best = cosine.abs().argmax(1, keepdim=True)
        v_s = v_s.gather(2, best.expand(-1, v_s.shape[1], -1)) * cosine.gather(1, best).sign()
        scale = F.normalize(sigma, dim=1).unsqueeze(1)
        now = v_s * scale, v_t * scale
        if before is not None:
            r_s, r_t = (torch.exp(-(a.unsqueeze(2) - b.unsqueeze(1)).pow(2) / 8) for a, b in zip(now, before))
            loss = loss + (r_s - r_t).pow(2).sum()
        before = now
    return loss / len(g_s[0])


def naive_ofd(g_s: Maps, g_t: Maps, margins: Maps) -> Tensor:
    """The cases of the partial distance, each with its mask. Each stage has half the weight of the next."""
    loss = torch.zeros(())
    for s, t, m in zip(g_s, g_t, margins):
        distance = (
            (s - m).pow(2) * ((s > m) & (t <= m)).float()
            + (s - t).pow(2) * ((s > t) & (t > m) & (t <= 0)).float()
            + (s - t).pow(2) * (t > 0).float()
        )
        loss = loss / 2 + distance.sum() / len(s)
    return loss


def naive_rkd(f_s: Tensor, f_t: Tensor, distance_weight: float = 25, angle_weight: float = 50) -> Tensor:
    """Distances from the Gram matrix; angles from the (B, B, D) differences."""

    def relations(e: Tensor) -> tuple[Tensor, Tensor]:
        squares = e.pow(2).sum(1)
        d = (squares.unsqueeze(1) + squares.unsqueeze(0) - 2 * e @ e.T).clamp(min=1e-12).sqrt()
        d = d * (1 - torch.eye(len(e), dtype=e.dtype))
        unit = F.normalize(e.unsqueeze(0) - e.unsqueeze(1), p=2, dim=2)
        return d / d[d > 0].mean(), torch.bmm(unit, unit.mT).flatten()

    (d_s, a_s), (d_t, a_t) = relations(f_s), relations(f_t)
    return distance_weight * F.smooth_l1_loss(d_s, d_t) + angle_weight * F.smooth_l1_loss(a_s, a_t)


def naive_crd(embed: Tensor, bank: Tensor, contrastive_index: Tensor, temperature: Tensor, z: Tensor) -> Tensor:
    """Gathers (B, K + 1, D) from the bank."""
    batch, columns = contrastive_index.shape
    near = bank.index_select(0, contrastive_index.flatten()).view(batch, columns, -1)
    p = torch.exp(torch.bmm(near, embed.unsqueeze(2)).squeeze(2) / temperature) / z
    noise = (columns - 1) / len(bank)
    log_positive = torch.log(p[:, 0] / (p[:, 0] + noise + 1e-7))
    log_negative = torch.log(noise / (p[:, 1:] + noise + 1e-7))
    return -(log_positive.sum() + log_negative.sum()) / batch


def naive_reviewkd(abfs: Iterable[Any], g_s: Maps, g_t: Maps) -> Tensor:
    """Fusion by concatenation, and each map pooled by itself; the modules are those of mdistiller."""
    fused, loss = None, torch.zeros(())
    for abf, x, f_t in zip(abfs, g_s[::-1], g_t[::-1]):
        x = abf.conv1(x)
        if fused is not None:
            y = F.interpolate(fused, x.shape[-2:], mode="nearest")
            z = abf.att_conv(torch.cat([x, y], dim=1))
            x = x * z[:, 0:1] + y * z[:, 1:2]
        fused = x if x.shape[-2:] == f_t.shape[-2:] else F.interpolate(x, f_t.shape[-2:], mode="nearest")
        loss = loss + _naive_hcl(abf.conv2(fused), f_t)
    return loss


def _naive_hcl(f_s: Tensor, f_t: Tensor) -> Tensor:
    loss, weight, total = F.mse_loss(f_s, f_t), 1.0, 1.0
    for size in (4, 2, 1):
        if size < f_s.shape[2]:
            weight /= 2
            total += weight
            pooled = F.adaptive_avg_pool2d(f_s, size), F.adaptive_avg_pool2d(f_t, size)
            loss = loss + weight * F.mse_loss(*pooled)
    return loss / total
