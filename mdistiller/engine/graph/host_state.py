"""What Python holds of a module beside the numbers in its tensors. A recorded step does not look at it again."""

from __future__ import annotations

import copy
from collections import deque
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


class HostSnapshot:
    """What Python holds of a module at this moment, to put it back."""

    def __init__(self, module: nn.Module) -> None:
        self._parts = [
            (part, {key: (value, _content(value)) for key, value in vars(part).items()}) for part in module.modules()
        ]

    def restore(self) -> None:
        """Put back every attribute, and what its lists, dicts and sets held. What other objects hold stays as it is."""
        for part, attributes in self._parts:
            for value, content in attributes.values():
                _refill(value, content)
            vars(part).clear()
            vars(part).update({key: value for key, (value, _) in attributes.items()})


def _content(value: Any) -> Any:
    """A copy of what a container holds; None for anything else."""
    return copy.copy(value) if isinstance(value, (list, dict, set, deque)) else None


def _refill(value: Any, content: Any) -> None:
    """Let the container `value` hold `content` again."""
    if content is None:
        return
    value.clear()
    (value.update if isinstance(value, (dict, set)) else value.extend)(content)


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
