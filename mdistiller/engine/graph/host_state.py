"""What Python holds of a module beside the numbers in its tensors. A recorded step does not look at it again."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Mapping, Set
from operator import attrgetter, methodcaller
from typing import Any

import torch.nn as nn
from torch import Tensor

from ...models.held import Held
from ...models.taps import Tap

HostState = dict[str, Any]

_pointer, _learns = methodcaller("data_ptr"), attrgetter("requires_grad")

_PLAIN = (bool, int, float, str)
# How deep containers are looked into.
_DEPTH = 3
# Whose objects are not looked into: they have no numbers for a step, or change in each.
_KNOWN = ("builtins", "functools", "mdistiller", "torch", "types", "yacs")


def host_state(module: nn.Module) -> HostState:
    """The attributes of all of the module's parts, by name: plain values, which tensors there are, and where these are.

    Also those of users' own objects in them. What the objects of a library hold is not seen, see `_KNOWN`.
    """
    return {
        f"{name}.{key}" if name else key: _seen(value, _DEPTH)
        for name, part in module.named_modules()
        for key, value in vars(part).items()
    }


def changed(before: HostState, after: HostState) -> list[str]:
    """The names of the attributes that differ."""
    return [key for key in {**before, **after} if before.get(key, ...) != after.get(key, ...)]


def attributes(owner: str, value: Any, but: Set[str]) -> HostState:
    """The attributes of an object that is no module, as `host_state`; `but` are left out."""
    return {f"{owner}.{key}": _seen(own, _DEPTH) for key, own in vars(value).items() if key not in but}


class Watch:
    """What can be seen of a module at every step: which layers, tensors and hooks it has, and its own numbers."""

    def __init__(self, module: nn.Module) -> None:
        self._owners = [module, *module.children()]  # a method, and one that it is built on
        self._held = Held(module)
        self._then = self._now()

    def changed(self) -> bool:
        """Whether it is another than at the beginning."""
        return not self._held.same() or self._then != self._now()

    def hooks(self) -> bool:
        """Whether a hook other than torch's and our own is called in a pass; nobody calls it in a replay."""
        own = (hook for hooks in self._held.hooks for hook in hooks.values())
        return any(not _module_of(hook).startswith(("torch.", Tap.__module__)) for hook in own)

    def _now(self) -> tuple[Any, ...]:
        tensors = self._held.tensors
        numbers = [(k, repr(v)) for own in self._owners for k, v in vars(own).items() if isinstance(v, _PLAIN)]
        return [*map(_pointer, tensors)], [*map(_learns, tensors)], numbers, sum(map(len, self._held.hooks))


def _module_of(hook: Any) -> str:
    return str(getattr(hook, "__module__", None) or type(hook).__module__)


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
    if depth and isinstance(value, (list, tuple, deque)):
        return tuple(_seen(own, depth - 1) for own in value)
    if isinstance(value, Set):
        return frozenset(map(id, value))
    if depth and hasattr(value, "__dict__") and type(value).__module__.partition(".")[0] not in _KNOWN:
        return id(value), _seen(vars(value), depth - 1)
    return id(value)
