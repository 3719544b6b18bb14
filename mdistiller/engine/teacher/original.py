"""A network of which a faster copy runs, and whether it is still as it was when the copy was made."""

from __future__ import annotations

from itertools import chain
from operator import attrgetter, is_, methodcaller

import torch
import torch.nn as nn
from torch import Tensor

from ...models.copies import PASS_HOOKS, has_hooks_everywhere
from ...models.tensor_groups import by_kind

# These ask a layer, or a tensor, in C: in a network of a hundred layers, loops in Python would take a millisecond.
_held = attrgetter("_parameters", "_buffers", "_modules")
_hooks = attrgetter(*PASS_HOOKS)
_values = methodcaller("values")
_pointer = methodcaller("data_ptr")
_version = attrgetter("_version")


class Original:
    """A network of which a copy was made, and the state of its weights at that time.

    `change` is called at every step, so its layers and tensors are listed once, and again only if a layer holds others.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._list()
        self._versions_then, self._sums_then = self._versions(), self._sums()

    def change(self, thoroughly: bool) -> str:
        """What has happened to the network, in words: a hook, or a weight replaced or changed in place; else nothing.

        Args:
            thoroughly: also look for changes behind autograd's back. This reads every weight.
        """
        if thoroughly or not self._holds_the_same():
            self._list()
        if self._versions() != self._versions_then or (thoroughly and self._sums() != self._sums_then):
            return "its weights change during training"
        return "it has hooks, which stored outputs skip" if has_hooks_everywhere() or any(self._of_hooks) else ""

    def _list(self) -> None:
        """List the layers, the dicts that they hold, and the tensors and layers in these."""
        self._layers = list(self.network.modules())
        self._dicts = list(chain.from_iterable(map(_held, self._layers)))
        self._of_hooks = list(chain.from_iterable(map(_hooks, self._layers)))
        self._empty = [own for own in self._dicts if not own]
        self._full = [own for own in self._dicts if own]
        self._entries = list(chain.from_iterable(map(_values, self._full)))
        self._tensors = [entry for entry in self._entries if isinstance(entry, Tensor)]

    def _holds_the_same(self) -> bool:
        """Whether a new list would be the same, object by object; a dict of hooks is taken to be the same for now."""
        # By identity, as `==` of two tensors is a tensor.
        if not all(map(is_, chain.from_iterable(map(_held, self._layers)), self._dicts)) or any(self._empty):
            return False
        entries = list(chain.from_iterable(map(_values, self._full)))
        return len(entries) == len(self._entries) and all(map(is_, entries, self._entries))

    def _versions(self) -> list[tuple[int, int]]:
        return list(zip(map(_pointer, self._tensors), map(_version, self._tensors)))

    def _sums(self) -> list[float]:
        # One sum for all tensors of a kind: one for each would be hundreds of kernels on a GPU.
        flat = by_kind([tensor.detach().flatten() for tensor in self._tensors])
        return torch.stack([torch.cat(own).sum(dtype=torch.float64) for (own,) in flat]).tolist()
