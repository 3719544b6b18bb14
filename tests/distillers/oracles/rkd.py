"""RKD directly from its equations: all difference vectors, distances from the Gram matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def naive_pdist(e: Tensor, squared: bool, eps: float) -> Tensor:
    lengths = e.pow(2).sum(dim=1)
    squares = (lengths[:, None] + lengths[None, :] - 2 * e @ e.T).clamp(min=eps)
    distances = squares if squared else squares.sqrt()
    return distances * (1 - torch.eye(len(e), dtype=e.dtype))


def naive_rkd_loss(
    f_s: Tensor,
    f_t: Tensor,
    squared: bool = False,
    eps: float = 1e-12,
    distance_weight: float = 25,
    angle_weight: float = 50,
) -> Tensor:
    def relations(f: Tensor) -> tuple[Tensor, Tensor]:
        e = f.flatten(1)
        distances = naive_pdist(e, squared, eps)
        directions = F.normalize(e[None] - e[:, None], dim=2)
        return distances / distances[distances > 0].mean(), directions @ directions.transpose(1, 2)

    distances_s, angles_s = relations(f_s)
    with torch.no_grad():
        distances_t, angles_t = relations(f_t)
    return distance_weight * F.smooth_l1_loss(distances_s, distances_t) + angle_weight * F.smooth_l1_loss(
        angles_s, angles_t
    )
