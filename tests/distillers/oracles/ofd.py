"""OFD's partial L2 distance by its three cases."""

from __future__ import annotations

from torch import Tensor


def naive_feat_loss(source: Tensor, target: Tensor, margin: Tensor) -> Tensor:
    below = (source > margin) & (target <= margin)
    between = (source > target) & (target > margin) & (target <= 0)
    above = target > 0
    loss = (
        (source - margin) ** 2 * below.to(source)
        + (source - target) ** 2 * between.to(source)
        + (source - target) ** 2 * above.to(source)
    )
    return loss.mean(dim=0).sum()
