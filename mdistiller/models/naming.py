"""What messages call a network."""

from __future__ import annotations

import torch.nn as nn


def network_name(network: nn.Module) -> str:
    """The name by which a network was built, if it holds one ("timm/resnet18"); else its class, without a wrapper's."""
    name = getattr(network, "name", None)
    return name if isinstance(name, str) and name else type(getattr(network, "bare", network)).__name__
