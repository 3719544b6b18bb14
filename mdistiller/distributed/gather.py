"""Gathers a batch that is spread over processes, for losses that compare its images with each other.

Most losses are means over images, so the mean of the ranks' gradients is the gradient of the whole batch. A loss that
compares the images of a batch with each other must see all of them: it calls `gather_batch` on what it compares.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .ranks import joined


def world_size() -> int:
    """Number of processes that share each batch."""
    return dist.get_world_size() if joined() else 1


def gather_batch(x: Tensor) -> Tensor:
    """The whole batch (B, ...) on every rank from the ranks' slices (B / world, ...), in the order of the ranks.

    Differentiable: every rank computes the same loss of the whole batch. Backward sums the gradients over the ranks;
    the mean over ranks that DistributedDataParallel takes afterwards turns this into the gradient of that loss.
    """
    if world_size() == 1:
        return x
    return _Gather.apply(x) if x.requires_grad else _gathered(x)


def _gathered(x: Tensor) -> Tensor:
    slices = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(slices, x.contiguous())
    return torch.cat(slices)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return _gathered(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(world_size())[dist.get_rank()]


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of `x` over the ranks, in place and without gradient."""
    if world_size() > 1:
        dist.all_reduce(x)
        x /= world_size()
    return x
