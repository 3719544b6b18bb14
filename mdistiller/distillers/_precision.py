"""Losses in full precision, for networks of any precision."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def full_precision(loss: Callable[P, T]) -> Callable[P, T]:
    """Decorator: compute a loss outside autocast, with its half-precision tensors converted to float32."""

    def to_float32(x: Any) -> Any:
        return x.float() if isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16) else x

    @functools.wraps(loss)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        device = next(x.device.type for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        # Entering autocast's context takes the host as long as an operation.
        off = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
        with off:
            return loss(*map(to_float32, args), **{k: to_float32(v) for k, v in kwargs.items()})  # type: ignore[arg-type]

    return run
