"""VID directly from its equations: a Gaussian log-density, one channel at a time."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


def naive_vid_loss(regressor: nn.Module, log_scale: Tensor, f_s: Tensor, f_t: Tensor, eps: float = 1e-5) -> Tensor:
    size = min(f_s.shape[-2:], f_t.shape[-2:])
    mean = regressor(F.adaptive_avg_pool2d(f_s, size))
    target = F.adaptive_avg_pool2d(f_t, size)
    nll = []
    for c in range(len(log_scale)):
        variance = torch.log(1 + torch.exp(log_scale[c])) + eps
        nll.append((0.5 * (mean[:, c] - target[:, c]) ** 2 / variance + 0.5 * torch.log(variance)).mean())
    return torch.stack(nll).mean()
