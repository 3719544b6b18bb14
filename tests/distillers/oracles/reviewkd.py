"""ReviewKD's loss with every map of both networks pooled at every size, and its fusion as in the paper's figure."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


def naive_hcl_loss(fstudent: Sequence[Tensor], fteacher: Sequence[Tensor]) -> Tensor:
    loss = fstudent[0].new_zeros(())
    for f_s, f_t in zip(fstudent, fteacher):
        level, weight, total = F.mse_loss(f_s, f_t), 1.0, 1.0
        for size in (4, 2, 1):
            if size >= f_s.shape[2]:
                continue
            weight /= 2
            pooled_s, pooled_t = F.adaptive_avg_pool2d(f_s, size), F.adaptive_avg_pool2d(f_t, size)
            level = level + weight * F.mse_loss(pooled_s, pooled_t)
            total += weight
        loss = loss + level / total
    return loss


def naive_abf(abf: nn.Module, x: Tensor, y: Tensor | None, shape: int, out_shape: int) -> tuple[Tensor, Tensor]:
    x = abf.conv1(x)
    if abf.att_conv is not None:
        assert y is not None
        y = F.interpolate(y, (shape, shape), mode="nearest")
        z = abf.att_conv(torch.cat([x, y], dim=1))
        x = x * z[:, 0].unsqueeze(1) + y * z[:, 1].unsqueeze(1)
    if x.shape[-1] != out_shape:
        x = F.interpolate(x, (out_shape, out_shape), mode="nearest")
    return abf.conv2(x), x
