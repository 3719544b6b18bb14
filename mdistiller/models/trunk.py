"""A network without the layers that one of its outputs does not need. The layers that stay are the network's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from .eval_mode import eval_mode

# What is read of a network's output.
Read = Callable[[Any], Tensor]


def unused_parameters(network: nn.Module, read: Read, image: Tensor) -> list[str]:
    """Names of the parameters on which `read(network(image))` does not depend, also of those without gradients."""
    named = dict(network.named_parameters())
    still = [p for p in named.values() if not p.requires_grad]
    try:
        for p in named.values():
            p.requires_grad_(True)
        with eval_mode(network), torch.enable_grad():
            output = read(network(image))
            slopes = torch.autograd.grad(output.sum(), list(named.values()), allow_unused=True)
    finally:
        for p in still:
            p.requires_grad_(False)
    return [name for name, slope in zip(named, slopes) if slope is None]


class Trunk:
    """A network for one of its outputs: `network` returns what the whole one does, of which only `read` is right.

    It is for deployment and cost: a classifier, or a last convolution, that is not needed is not saved or computed.
    A network that does not run without them stays whole.

    Args:
        whole: stays as it is; the layers that stay are shared with it.
        read: the output.
        image: (B, 3, H, W), of the size that it takes.

    Attributes:
        unused: names of the parameters that `read` does not depend on.
        network: the network without their layers.
    """

    def __init__(self, whole: nn.Module, read: Read, image: Tensor) -> None:
        self.unused = unused_parameters(whole, read, image)
        self._links: list[tuple[nn.Module, nn.Module, list[str]]] = []
        self.network = self._without(whole, set(self.unused), "")
        if not _same(whole, self.network, read, image):
            self._links, self.network = [], whole

    def follow(self) -> None:
        """Take over the modes of the whole network, and layers that were exchanged in it, as by SyncBatchNorm's."""
        for own, whole, names in self._links:
            own.training = whole.training
            own._modules.update({name: whole._modules[name] for name in names})

    def _without(self, whole: nn.Module, unused: set[str], prefix: str) -> nn.Module:
        """`whole` itself, if all its layers stay, or a module that shares those that do."""
        names = [prefix + name for name, _ in whole.named_parameters()]
        if unused.isdisjoint(names):
            return whole
        if prefix and _is_layer(whole) and unused.issuperset(names):
            return _Passing(whole)
        own: Any = type(whole).__new__(type(whole))
        vars(own).update(vars(whole))  # its tensors and hooks are those of the whole network, in the same dictionaries
        own._modules = {
            name: None if child is None else self._without(child, unused, f"{prefix}{name}.")
            for name, child in whole._modules.items()
        }
        self._links.append(
            (own, whole, [name for name, child in whole._modules.items() if own._modules[name] is child])
        )
        return own


def _is_layer(module: nn.Module) -> bool:
    """Whether it is called with one tensor, and not a list of layers or a block of which some are called."""
    holds_parameters = next(module.parameters(recurse=False), None) is not None
    return type(module) is nn.Sequential or holds_parameters or next(module.children(), None) is None


class _Passing(nn.Module):
    """Stands in a layer's place, with its hooks, and returns what it is given."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._forward_hooks, self._forward_pre_hooks = layer._forward_hooks, layer._forward_pre_hooks
        self.training = layer.training

    def forward(self, x: Any) -> Any:
        return x


def _same(whole: nn.Module, part: nn.Module, read: Read, image: Tensor) -> bool:
    try:
        with eval_mode(whole, part):
            return bool(torch.equal(read(whole(image)), read(part(image))))
    except Exception:  # it needs what was taken out, in whatever way
        return False


def parameter_layer(classifier: nn.Linear) -> nn.Module:
    """The layer that holds a classifier's parameters: itself or, for a `PointwiseLinear`, the 1x1 convolution."""
    return classifier if next(classifier.parameters(), None) is not None else classifier._conv  # type: ignore[return-value]
