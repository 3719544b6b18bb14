"""What every network here is: image -> (logits, features), and the logits alone for torch.jit.trace."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.nn as nn
from torch import Tensor


class Network(nn.Module):
    """An image classifier that also returns its feature maps, through `with_features`."""

    def __prepare_scriptable__(self) -> NoReturn:
        raise TypeError(
            f"torch.jit.script cannot compile {type(self).__name__}, whose features are lists and tensors in one dict; "
            "torch.jit.trace(network.eval(), image) gives a program that returns the logits"
        )


def with_features(logits: Tensor, features: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """What a network's forward returns: (logits, features); but the logits alone while torch.jit.trace records.

    A traced program has no type for the features, and is made for deployment, which needs none.
    """
    return logits if torch.jit.is_tracing() else (logits, features)  # type: ignore[return-value]
