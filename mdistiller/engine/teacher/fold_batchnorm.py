"""A faster copy of a trained network, for use as a teacher, which computes the same function.

BatchNorms are folded into the convolutions before them, outputs that are not read are left out, and sums and ReLUs
work in place if nothing else reads their operand, so that a feature map goes through memory once, not three times.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor, fx
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ...console import reason
from ...models.copies import copy_without_hooks
from ...models.outputs import restricted
from ...models.taps import TapTracer

_FOLDED: dict[Any, Any] = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d}
_FRESH = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)  # layers whose output is a new tensor
_RELUS = (F.relu, torch.relu)


class CannotFold(Exception):
    """There is no such copy; the message says why."""


def fold_batchnorm(network: nn.Module, image: Tensor, features: Sequence[str] | None = None) -> fx.GraphModule:
    """A copy of `network`, for evaluation only, without the BatchNorms that directly follow a convolution.

    Args:
        network: image -> (logits, features by name); in eval mode; it is not changed.
        image: (1, 3, H, W); for it the copy must return what `network` returns, up to rounding.
        features: names of the features, or of single maps, that the copy returns; None for all of them. In the place
            of a map that it does not return is None.

    Raises:
        CannotFold: torch.fx cannot trace the network's forward, or the copy computes another function.
    """
    try:
        with torch.no_grad():
            folded = _without_batchnorms(network)
            if features is not None:
                _keep(folded, features)
            _overwrite(folded)
            folded.recompile()
            same = _same_function(network, folded, image, features)
    except Exception as error:  # torch.fx runs foreign code here, which may raise anything
        raise CannotFold(reason(error)) from None
    if not same:
        raise CannotFold("the folded copy computes another function")
    return folded.requires_grad_(False)


def _without_batchnorms(network: nn.Module) -> fx.GraphModule:
    """A traced copy in which each convolution has taken over the BatchNorm that alone reads it."""
    own = copy_without_hooks(network)
    folded = fx.GraphModule(own, TapTracer().trace(own))
    calls = Counter(node.target for node in folded.graph.nodes if node.op == "call_module")
    for node in list(folded.graph.nodes):
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        layer: Any = folded.get_submodule(str(before.target))
        norm: Any = folded.get_submodule(str(node.target))
        # A layer that is called twice cannot take over what follows one of its calls.
        follows = type(norm) is _FOLDED.get(type(layer))
        if follows and norm.track_running_stats and calls[before.target] == 1:
            parent, _, name = str(before.target).rpartition(".")
            setattr(folded.get_submodule(parent), name, fuse_conv_bn_eval(layer, norm))
            node.replace_all_uses_with(before)
            folded.graph.erase_node(node)
    folded.delete_all_unused_submodules()
    return folded


def _same_function(network: nn.Module, folded: nn.Module, image: Tensor, features: Sequence[str] | None) -> bool:
    """Whether both return the same in float64, on the CPU.

    In float32 the rounding of a deep network on a GPU, which computes its convolutions in TF32, looks like a fault.
    """
    exact = image.detach().cpu().double()
    logits, by_name = copy_without_hooks(network).cpu().double()(exact)
    if features is not None:
        by_name = restricted(by_name, features)
    return _agree((logits, by_name), copy_without_hooks(folded).cpu().double()(exact))


def _keep(folded: fx.GraphModule, features: Sequence[str]) -> None:
    """Remove the operations that only other features need."""
    (output,) = [node for node in folded.graph.nodes if node.op == "output"]
    ((logits, by_name),) = output.args
    output.args = ((logits, restricted(by_name, features)),)
    folded.graph.eliminate_dead_code()


def _overwrite(folded: fx.GraphModule) -> None:
    """Make sums and ReLUs work in place on an operand that nothing else reads."""
    for node in folded.graph.nodes:
        own = [value for value in node.args if _is_own(value, folded)]
        if own and _is_relu(node, folded):
            node.op, node.target, node.args, node.kwargs = "call_function", torch.relu_, (own[0],), {}
        elif own and node.op == "call_function" and node.target is operator.add:
            (other,) = (value for value in node.args if value is not own[0])
            if isinstance(other, fx.Node):
                node.target, node.args = operator.iadd, (own[0], other)


def _is_relu(node: fx.Node, folded: fx.GraphModule) -> bool:
    if node.op == "call_module":
        return type(folded.get_submodule(str(node.target))) is nn.ReLU
    return node.op == "call_function" and node.target in _RELUS


def _is_own(value: Any, folded: fx.GraphModule) -> bool:
    """Whether `value` is a new tensor of one operation that only one other operation reads."""
    if not isinstance(value, fx.Node) or len(value.users) != 1:
        return False
    if value.op == "call_module":
        return isinstance(folded.get_submodule(str(value.target)), _FRESH)
    return value.op == "call_function" and value.target in (operator.iadd, torch.relu_)


def _agree(one: Any, other: Any) -> bool:
    """Whether nested outputs are equal up to a thousandth of each tensor's largest value."""
    if isinstance(one, Tensor):
        return bool((one - other).abs().max() <= 1e-3 * one.abs().max())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_agree(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_agree, one, other))
    return bool(one == other)
