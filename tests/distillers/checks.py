"""Checks for every loss: agreement with its oracle, gradients, low precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float64 of `shape`."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masked(*shape: int, classes: Iterable[tuple[int, int]], seed: int = 0) -> Tensor:
    """Normal logits float64 of `shape`, of which those at `classes`, pairs of image and class, are -inf."""
    logits = 3 * normal(*shape, seed=seed)
    for place in classes:
        logits[place] = -math.inf
    return logits


def check_agrees(
    ours: Callable[..., Tensor], naive: Callable[..., Tensor], *inputs: Tensor, rtol: float = 1e-9
) -> None:
    """Equal values and equal gradients with respect to the first input, all float64."""
    results = []
    for loss in (ours, naive):
        leaf = inputs[0].clone().requires_grad_()
        value = loss(leaf, *inputs[1:])
        results.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
    torch.testing.assert_close(results[0], results[1], rtol=rtol, atol=1e-12)


def check_precision(loss: Callable[..., Tensor], *inputs: Tensor, rtol: float = 1e-4, atol: float = 1e-7) -> None:
    """float64 stays float64; the values of float32, and of bfloat16 under autocast, agree with it within `rtol`."""
    assert loss(*inputs).dtype == torch.float64
    for dtype in (torch.float32, torch.bfloat16):
        leaf, *rest = (x.to(dtype) for x in inputs)
        exact = loss(leaf.double(), *(x.double() for x in rest))
        leaf.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = loss(leaf, *rest)
        value.backward()
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.detach().double(), exact, rtol=rtol, atol=atol)
        assert leaf.grad is not None and leaf.grad.isfinite().all()
