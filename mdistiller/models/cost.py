"""What a network costs to deploy: its parameters and its multiply-accumulates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from .eval_mode import eval_mode


def count_parameters(module: nn.Module) -> int:
    """Number of parameters of `module`."""
    return sum(p.numel() for p in module.parameters())


@dataclass(frozen=True)
class Cost:
    """Number of parameters, and multiply-accumulates for one image (convolutions and matrix products)."""

    parameters: int
    macs: int

    def __str__(self) -> str:
        return f"{self.parameters / 1e6:.2f} M parameters, {self.macs / 1e6:.1f} M MACs"


def network_cost(model: nn.Module, image_size: int) -> Cost:
    """The cost of `model` for one image of 3 x image_size x image_size, by torch's own flop counter."""
    like = next(model.parameters())
    counter = FlopCounterMode(display=False)
    with eval_mode(model), counter:
        model(torch.zeros(1, 3, image_size, image_size, dtype=like.dtype, device=like.device))
    return Cost(count_parameters(model), counter.get_total_flops() // 2)
