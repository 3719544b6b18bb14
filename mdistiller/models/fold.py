"""A trained network with its BatchNorms folded into the convolutions before them: the same function, less work."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.fx.experimental.optimization import fuse


def fold_batchnorm(network: nn.Module, image: Tensor) -> nn.Module | None:
    """A copy of `network`, for evaluation only, without the BatchNorms that follow a convolution and nothing else.

    Args:
        network: in eval mode; it is left alone.
        image: (1, 3, H, W); the copy must give for it what `network` gives, up to rounding.

    Returns:
        The copy; None where torch.fx cannot follow the network's forward, or where the copy is another function.
    """
    try:
        with torch.no_grad():
            folded = fuse(network, inplace=False)
            same = _agree(network(image), folded(image))
    except Exception:  # torch.fx meets foreign code here, which may do anything; without it all is as before
        return None
    return folded.requires_grad_(False) if same else None


def _agree(one: Any, other: Any) -> bool:
    """Whether nested outputs are equal to a thousandth of their largest value."""
    if isinstance(one, Tensor):
        return bool((one - other).abs().max() <= 1e-3 * one.abs().max())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_agree(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_agree, one, other))
    return bool(one == other)
