"""What the layers of a network hold: tensors, other layers, hooks; listed once, and compared at every step."""

from __future__ import annotations

from itertools import chain
from operator import attrgetter, is_, methodcaller

import torch.nn as nn
from torch import Tensor

from .copies import PASS_HOOKS
from .taps import others

# These ask a layer in C: in a network of a hundred layers, loops in Python would take a millisecond.
_held = attrgetter("_parameters", "_buffers", "_modules")
_hooks = attrgetter(*PASS_HOOKS)
_values = methodcaller("values")


class Held:
    """The layers of a network, and what they hold.

    Attributes:
        tensors: their parameters and buffers.
        hooks: their dicts of hooks of a pass, by number, which change with the hooks.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self.refresh()

    def refresh(self) -> None:
        """List everything anew."""
        self._layers = [*self._network.modules()]
        self._dicts = [*chain.from_iterable(map(_held, self._layers))]
        self.hooks = [*chain.from_iterable(map(_hooks, self._layers))]
        self._hooked, self._bare = [*filter(None, self.hooks)], [own for own in self.hooks if not own]
        self._empty = [own for own in self._dicts if not own]
        self._full = [own for own in self._dicts if own]
        self._entries = self._present()
        self.tensors = [entry for entry in self._entries if isinstance(entry, Tensor)]

    def same(self) -> bool:
        """Whether a new list would be the same, object by object; a dict of hooks is taken to be the same for now."""
        # By identity, as `==` of two tensors is a tensor.
        if not all(map(is_, chain.from_iterable(map(_held, self._layers)), self._dicts)) or any(self._empty):
            return False
        entries = self._present()
        return len(entries) == len(self._entries) and all(map(is_, entries, self._entries))

    def hooked(self) -> bool:
        """Whether a hook of a pass is registered on a layer; a tap of a wrapped network is not counted."""
        return any(self._bare) or any(map(others, self._hooked))

    def _present(self) -> list[object]:
        return [*chain.from_iterable(map(_values, self._full))]
