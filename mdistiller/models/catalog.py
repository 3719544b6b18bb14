"""Networks by name, for Python: made as training uses them, and listed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib.util import find_spec

import torch.nn as nn

from ..errors import UserError
from .sources import build_network, source_dict, source_of


def create_model(
    name: str,
    num_classes: int | None = None,
    pretrained: bool = False,
    image_size: int = 0,
    feats: Sequence[str] = (),
) -> nn.Module:
    """The network `name` as training uses it: (B, 3, H, W) -> (logits (B, C), features by name).

    The features are {"feats", "preact_feats": lists of maps (B, C, H, W), "last_map": (B, D, H, W), "pooled_feat":
    (B, D)}. A network of another library is wrapped; `.bare` is the network itself.

    Args:
        name: "resnet56", "timm/resnet18", "torchvision/vit_b_16", "hf-hub:user/repository", "file.py:function".
        num_classes: C; None: those of the network's published weights.
        pretrained: with the weights that its source publishes.
        image_size, feats: see `sources.build_network`.

    Raises:
        UserError: no such network or weights, or nothing tells the number of classes.

    Example:
        >>> net = create_model("torchvision/resnet18", num_classes=10, image_size=64)
        >>> logits, features = net(torch.rand(2, 3, 64, 64))
        >>> logits.shape, [tuple(m.shape[1:]) for m in features["feats"]]
        (torch.Size([2, 10]), [(64, 32, 32), (64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)])
    """
    source, own = source_of(name)
    classes = source.num_classes(own) if num_classes is None else num_classes
    if classes < 1:
        raise UserError(f"nothing tells how many classes {name} has; set num_classes")
    return build_network(name, classes, image_size, pretrained, feats)


def list_models(pattern: str = "*") -> list[str]:
    """The names of networks that match `pattern`, such as "timm/*mobilenet*" or "*resnet18*".

    Without timm, its networks are not listed.

    Raises:
        UserError: the pattern begins with "timm", which is not installed.

    Example:
        >>> list_models("torchvision/resnet1*")
        ['torchvision/resnet101', 'torchvision/resnet152', 'torchvision/resnet18']
    """
    names = []
    for prefix, source in source_dict.items():
        if prefix != "timm" or pattern.startswith("timm") or (_may_begin(pattern, "timm/") and find_spec("timm")):
            names += source.names()
    return [name for name in names if fnmatchcase(name, pattern)]


def _may_begin(pattern: str, prefix: str) -> bool:
    """Whether names that match `pattern` may begin with `prefix`."""
    literal = re.split(r"[*?[]", pattern, maxsplit=1)[0]
    return prefix.startswith(literal) or literal.startswith(prefix)
