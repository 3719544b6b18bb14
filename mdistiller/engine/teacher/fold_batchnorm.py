"""A faster copy of a trained network, for use as a teacher, which computes the same function.

BatchNorms are folded into the convolutions before them, outputs that are not read are left out, and sums and ReLUs
work in place if nothing else reads their operand, so that a feature map goes through memory once, not three times.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.optimization import fuse

_FRESH = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)  # layers whose output is a new tensor
_RELUS = (F.relu, torch.relu)


def fold_batchnorm(
    network: nn.Module, image: Tensor, features: Sequence[str] | None = None
) -> nn.Module | None:
    """A copy of `network`, for evaluation only, without the BatchNorms that directly follow a convolution.

    Args:
        network: image -> (logits, features by name); in eval mode; it is not changed.
        image: (1, 3, H, W); for it the copy must return what `network` returns, up to rounding.
        features: names of the features that the copy returns; None for all of them.

    Returns:
        The copy; None if torch.fx cannot trace the network's forward, or if the copy computes another function.
    """
    try:
        with torch.no_grad():
            folded: Any = fuse(network, inplace=False)
            if features is not None:
                _keep(folded, features)
            _overwrite(folded)
            folded.recompile()
            logits, by_name = network(image)
            if features is not None:
                by_name = {name: by_name[name] for name in by_name if name in features}
            same = _agree((logits, by_name), folded(image))
    except Exception:  # torch.fx runs foreign code here, which may raise anything; without a copy nothing changes
        return None
    return folded.requires_grad_(False) if same else None


def _keep(folded: fx.GraphModule, features: Sequence[str]) -> None:
    """Remove the operations that only other features need."""
    (output,) = [node for node in folded.graph.nodes if node.op == "output"]
    ((logits, by_name),) = output.args
    output.args = ((logits, {name: node for name, node in by_name.items() if name in features}),)
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
