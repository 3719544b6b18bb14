"""A batch that is spread over processes, put together again, for the losses that compare images with each other.

Most losses are means over images, so the mean of the ranks' gradients is that of the whole batch. A loss that compares
the images of a batch with each other must see all of them: it takes `gather_batch` of what it compares.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def world_size() -> int:
    """Number of processes that share each batch."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_batch(x: Tensor) -> Tensor:
    """The whole batch (B, ...) on every rank from its parts (B / world, ...), in the order of the ranks.

    Differentiable: every rank works out the same loss of the whole batch; the gradients are summed over the ranks, and
    the mean over ranks that DistributedDataParallel takes afterwards makes of that the loss's own.
    """
    if world_size() == 1:
        return x
    return _Gather.apply(x) if x.requires_grad else _gathered(x)


def _gathered(x: Tensor) -> Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


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
    """The mean of `x` over the ranks, without gradient."""
    if world_size() > 1:
        dist.all_reduce(x)
        x /= world_size()
    return x
