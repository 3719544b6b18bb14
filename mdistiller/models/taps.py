"""Taps: forward hooks of our own by which a wrapped network's layers hand over their inputs and outputs.

A tap belongs to its network, as its layers do: copies keep it, and it does not count among the hooks of others.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from typing import Any

import torch.nn as nn
from torch import Tensor, fx

# A layer's path within the network, and whether its input is read (True) or its output.
Place = tuple[str, bool]
Captured = dict[Place, list[Tensor]]


def tensor_of(value: Any) -> Tensor | None:
    """The tensor that a layer takes or returns; of several, the first one; None where that is no tensor."""
    first = value[0] if isinstance(value, (tuple, list)) and value else value
    return first if isinstance(first, Tensor) else None


class Store:
    """What taps have seen in the forward that is running; between forwards it holds nothing."""

    def __init__(self) -> None:
        self.captured: Captured | None = None


class Tap:
    """A forward hook (of a layer's output) or pre-hook (of its input) that fills the store of its network.

    Attributes:
        clone: keep a copy, as something later in the network writes into the tensor itself.
    """

    def __init__(self, store: Store, place: Place, clone: bool = False) -> None:
        self.store, self.place, self.clone = store, place, clone

    def __call__(self, layer: nn.Module, args: Any, output: Any = None) -> None:
        if self.store.captured is None:  # the bare network was called
            return
        value = args if self.place[1] else output
        tensor = value[0] if isinstance(value, (tuple, list)) else value
        self.store.captured.setdefault(self.place, []).append(tensor.clone() if self.clone else tensor)


class Taps:
    """The taps of one network.

    Args:
        network: gets the hooks.
        places: whose tensors are captured.
        clone: the places of which copies are kept.
    """

    def __init__(self, network: nn.Module, places: Iterable[Place], clone: Iterable[Place] = ()) -> None:
        self.store, copied = Store(), set(clone)
        self.handles = []
        for place in dict.fromkeys(places):
            layer, tap = network.get_submodule(place[0]), Tap(self.store, place, place in copied)
            register = layer.register_forward_pre_hook if place[1] else layer.register_forward_hook
            self.handles.append(register(tap))

    def run(self, network: nn.Module, image: Tensor) -> tuple[Any, Captured]:
        """The network's output for `image`, and what each tap saw: one tensor a call of its layer."""
        outer = self.store.captured
        captured: Captured = {}
        self.store.captured = captured
        try:
            output = network(image)
        finally:
            self.store.captured = outer
        return output, captured

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def tap_numbers(network: nn.Module) -> set[int]:
    """The numbers, which torch gives to each hook, of the taps in a network."""
    return {number for hooks in _hooks(network) for number, hook in hooks.items() if isinstance(hook, Tap)}


def remove_taps(network: nn.Module, keep: Container[int] = ()) -> None:
    """Remove the taps from a network, but for those with the numbers `keep`."""
    for hooks in _hooks(network):
        for number in [number for number, hook in hooks.items() if isinstance(hook, Tap) and number not in keep]:
            del hooks[number]


def _hooks(network: nn.Module) -> Iterator[dict[int, Any]]:
    for layer in network.modules():
        yield layer._forward_hooks
        yield layer._forward_pre_hooks


def others(hooks: dict[int, Any]) -> bool:
    """Whether one of a layer's hooks is no tap."""
    return any(not isinstance(hook, Tap) for hook in hooks.values())


class TapTracer(fx.Tracer):
    """Traces into layers that have taps: torch.fx would call their hooks when the traced program runs, not before."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        tapped = any(isinstance(hook, Tap) for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))
        return not tapped and super().is_leaf_module(m, module_qualified_name)
