"""What every network here is: image -> (logits, features), and the logits alone for torch.jit.trace."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

import torch
import torch.nn as nn


class Network(nn.Module):
    """An image classifier that returns (logits, features by name).

    Of its features, "last_map" (B, D, H, W) is the map that it pools for its classifier: `get_classifier()` of the mean
    of that map are the logits. It need not be the last of "feats".

    `torch.jit.trace(network, image)` records the logits alone: a traced program has no type for the features, and is
    made for deployment, which needs none. Within another module that is traced, both are returned as always.
    """

    # The linear layer from the pooled feature to the logits.
    classifier_name: ClassVar[str] = "fc"

    def get_classifier(self) -> Any:
        """The layer from the pooled feature to the logits; `classifier.classifier_of` gives it as an nn.Linear."""
        return getattr(self, self.classifier_name)

    def _slow_forward(self, *args: Any, **kwargs: Any) -> Any:
        """What torch calls in place of `forward` while it traces."""
        output = super()._slow_forward(*args, **kwargs)
        modules = torch.jit._trace._trace_module_map or {}
        return output[0] if modules.get("__module") is self else output

    def __prepare_scriptable__(self) -> NoReturn:
        raise TypeError(
            f"torch.jit.script cannot compile {type(self).__name__}, whose features are lists and tensors in one dict; "
            "torch.jit.trace(network.eval(), image) gives a program that returns the logits"
        )
