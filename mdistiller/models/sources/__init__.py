"""Networks by name: of this library, of timm, of torchvision, of the Hugging Face hub, of a user's own file.

    resnet56                    a bare name: of this library
    timm/resnet18.a1_in1k       of timm, with or without the tag of its published weights
    torchvision/vit_b_16
    hf-hub:user/repository      through timm
    path/to/file.py:function    an nn.Module that gives logits, or already (logits, features)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn as nn

from ...console import reason
from ...errors import UserError
from ...registry import Registry
from ..wrapped import WrappedNetwork, wrap
from ._registered import FAMILIES, Registered, family_of
from ._source import NativeInput, Source
from ._timm import Hub, Timm
from ._torchvision import Torchvision
from ._user_file import FORM, UserFile

__all__ = [
    "FAMILIES",
    "NativeInput",
    "Source",
    "build_network",
    "family_of",
    "is_foreign",
    "source_dict",
    "source_of",
]

_BARE, _FILE = "mdistiller", "file"
# What stands before a name -> where the network comes from.
source_dict = Registry(
    "source of networks",
    {_BARE: Registered(), "timm": Timm(), "torchvision": Torchvision(), "hf-hub": Hub(), _FILE: UserFile()},
)


def is_foreign(name: str) -> bool:
    """Whether a network's name is not that of one of this library."""
    return "/" in name or ":" in name or name.endswith(".py")


def source_of(name: str) -> tuple[Source, str]:
    """The source of the network `name`, and the network's name within it.

    Raises:
        UserError: there is no such source.
    """
    if not is_foreign(name):
        return source_dict[_BARE], name
    if ".py:" in name:
        return source_dict[_FILE], name
    if name.endswith(".py"):
        raise UserError(f"network {name!r} is a file; name a function of it too: {FORM}")
    mark = min((mark for mark in "/:" if mark in name), key=name.index)
    prefix, _, own = name.partition(mark)
    return source_dict[prefix], own


def build_network(
    name: str, num_classes: int, image_size: int = 0, pretrained: bool = False, feats: Sequence[str] = ()
) -> nn.Module:
    """The network `name`: (B, 3, H, W) -> (logits (B, num_classes), features by name).

    Args:
        name: see the module's docstring.
        num_classes: width of the logits.
        image_size: height and width of the images, in pixels; 0: those that the network was made for.
        pretrained: with the weights that its source publishes. Where these are for other classes, the classifier has
            fresh weights, and the network's `fresh_head` is True.
        feats: paths of the layers in a network of another library whose outputs are its feature maps, from shallow to
            deep; empty: found.

    Raises:
        UserError: no such source, network, weights or layer, or the network takes no such images.
    """
    source, own = source_of(name)
    network = source.build(own, num_classes, image_size, pretrained)
    if not source.wraps:
        if feats:
            raise UserError(f"{name} is a network of this library, whose maps are fixed; name no layers {list(feats)}")
        return network
    fresh = bool(vars(network).pop("fresh_head", False))
    size = image_size or source.native_input(own).size
    try:
        wrapped = wrap(network, num_classes, size, feats, name)
    except UserError:
        raise
    except Exception as error:  # a library's network; an error of the user's own code keeps its traceback
        if isinstance(source, UserFile):
            raise
        raise UserError(f"{name} cannot take images of {size}x{size} ({reason(error)}); choose another size") from error
    if isinstance(wrapped, WrappedNetwork):
        wrapped.fresh_head = fresh
    return wrapped
