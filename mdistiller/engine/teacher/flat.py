"""A traced network whose convolutions and linear layers are plain functions, without a module's call around each."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import fx


def flatten_calls(network: fx.GraphModule) -> fx.GraphModule:
    """`network` itself, in whose forward every convolution and linear layer has become one function of its weights.

    It computes the same, bit for bit. A call of a module costs the host several microseconds, for hooks that a frozen
    copy has not, and for finding the layer and its weights by name. Weights become parameters of the network itself,
    named after their layers, and move with it.

    Layers of another kind, of a class derived from these, or called with the image by name, stay modules.
    """
    for node in list(network.graph.nodes):
        plain = node.op == "call_module" and len(node.args) == 1 and not node.kwargs
        layer: Any = network.get_submodule(str(node.target)) if plain else None
        function: Any
        if type(layer) is nn.Conv2d and layer.padding_mode == "zeros":
            function, settings = torch.conv2d, [layer.stride, layer.padding, layer.dilation, layer.groups]
        elif type(layer) is nn.Linear:
            function, settings = F.linear, []
        else:
            continue
        with network.graph.inserting_before(node):
            weights = [_own(network, str(node.target), name) for name in ("weight", "bias")]
        node.op, node.target, node.kwargs = "call_function", function, {}
        node.args = (node.args[0], *weights, *settings)
    network.delete_all_unused_submodules()
    network.recompile()
    return network


def _own(network: fx.GraphModule, layer: str, name: str) -> fx.Node | None:
    """A read of a layer's weight, as a parameter of `network`; None for a layer without it."""
    value = getattr(network.get_submodule(layer), name)
    if value is None:
        return None
    own = f"{layer}.{name}".replace(".", "_")
    while getattr(network, own, value) is not value:  # "a.b_c" and "a_b.c"
        own += "_"
    network.register_parameter(own, value)
    return network.graph.get_attr(own)
