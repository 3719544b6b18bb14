"""What Python holds of a module beside the numbers in its tensors. A recorded step does not look at it again."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch.nn as nn
from torch import Tensor

HostState = dict[str, Any]

# How deep containers are looked into.
_DEPTH = 3


def host_state(module: nn.Module) -> HostState:
    """The attributes of all of the module's parts, by name: plain values, which tensors there are, and where these are.

    What other objects hold is not seen.
    """
    return {
        f"{name}.{key}" if name else key: _seen(value, _DEPTH)
        for name, part in module.named_modules()
        for key, value in vars(part).items()
    }


def changed(before: HostState, after: HostState) -> list[str]:
    """The names of the attributes that differ."""
    return [key for key in {**before, **after} if before.get(key, ...) != after.get(key, ...)]


def _seen(value: Any, depth: int) -> Any:
    """Something that is equal as long as `value` is the same to a step that reads it."""
    if value is None or isinstance(value, (bool, int, str, bytes)):
        return value
    if isinstance(value, (float, complex)):
        return repr(value)  # NaN is not equal to itself
    if isinstance(value, Tensor):
        return id(value), value.data_ptr(), value.requires_grad
    if depth and isinstance(value, Mapping):
        return tuple((_seen(key, depth - 1), _seen(own, depth - 1)) for key, own in value.items())
    if depth and isinstance(value, (list, tuple)):
        return tuple(_seen(own, depth - 1) for own in value)
    if isinstance(value, Set):
        return frozenset(map(id, value))
    return id(value)
