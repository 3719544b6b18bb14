"""DistributedDataParallel around a module whose parameters are partly frozen."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel


def data_parallel(module: nn.Module, frozen: Iterable[str]) -> nn.Module:
    """`module` with its gradients averaged over the ranks during the backward pass.

    Every rank keeps the BatchNorm statistics of its own images until `Ranks.copy_buffers`.

    Args:
        frozen: names of the parameters and buffers that are never trained; they are neither averaged nor sent.
    """
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, list(frozen))
    known = inspect.signature(DistributedDataParallel).parameters
    own_buffers: Any = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    return DistributedDataParallel(module, gradient_as_bucket_view=True, **own_buffers)


def is_data_parallel(module: nn.Module) -> TypeGuard[DistributedDataParallel]:
    """Whether `data_parallel` made the module."""
    return isinstance(module, DistributedDataParallel)


def release(module: nn.Module) -> None:
    """Let the gradients of a module that `data_parallel` made no longer be averaged; others are left as they are."""
    if is_data_parallel(module):
        module._remove_autograd_hooks()


@contextmanager
def averaging(module: nn.Module, now: bool) -> Iterator[None]:
    """Within this context, backward averages the gradients over the ranks or, if not `now`, only adds them up locally.

    For a module without DistributedDataParallel this changes nothing.
    """
    if is_data_parallel(module) and not now:
        with module.no_sync():
            yield
    else:
        yield
