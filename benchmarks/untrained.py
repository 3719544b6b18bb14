"""An untrained network that stands in for a trained teacher."""

from __future__ import annotations

import torch
import torch.nn as nn

from mdistiller.models import build_model, cifar_model_dict


def untrained(name: str, size: int = 32) -> nn.Module:
    """The network `name` with BatchNorm statistics of random images (3, size, size): its outputs have a usual scale."""
    torch.manual_seed(0)
    network = build_model(cifar_model_dict, name, 100).train()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the plain mean over batches
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(32, 3, size, size))
    return network
