"""A network of which a faster copy runs, and whether it is still as it was when the copy was made."""

from __future__ import annotations

from operator import attrgetter, methodcaller

import torch
import torch.nn as nn

from ...models.copies import has_hooks_everywhere
from ...models.held import Held
from ...models.tensor_groups import by_kind

_pointer = methodcaller("data_ptr")
_version = attrgetter("_version")


class Original:
    """A network of which a copy was made, and the state of its weights at that time.

    `change` is called at every step, so its layers and tensors are listed once, and again only if a layer holds others.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network, self._held = network, Held(network)
        self._versions_then, self._sums_then = self._versions(), self._sums()

    def change(self, thoroughly: bool) -> str:
        """What has happened to the network, in words: a hook, or a weight replaced or changed in place; else nothing.

        Args:
            thoroughly: also look for changes behind autograd's back. This reads every weight.
        """
        if thoroughly or not self._held.same():
            self._held.refresh()
        if self._versions() != self._versions_then or (thoroughly and self._sums() != self._sums_then):
            return "its weights change during training"
        return "it has hooks, which stored outputs skip" if has_hooks_everywhere() or self._held.hooked() else ""

    def _versions(self) -> list[tuple[int, int]]:
        return list(zip(map(_pointer, self._held.tensors), map(_version, self._held.tensors)))

    def _sums(self) -> list[float]:
        # One sum for all tensors of a kind: one for each would be hundreds of kernels on a GPU.
        flat = by_kind([tensor.detach().flatten() for tensor in self._held.tensors])
        return torch.stack([torch.cat(own).sum(dtype=torch.float64) for (own,) in flat]).tolist()
