"""What a network returns for images, (logits (B, C), features by name), and which images it takes: both checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from ..console import one_line, out_of_memory, reason
from ..errors import UserError
from .eval_mode import eval_mode

FORM = (
    "a network returns (logits (B, C), features by name): end its forward with `return logits, features`, where "
    "features is a dictionary, {} for a method that reads none"
)
_FEATURES = (
    "feats and preact_feats are lists of maps (B, C, H, W), last_map (B, D, H, W) is the map that is pooled for the "
    "classifier, pooled_feat (B, D) is its mean"
)
_LISTS = ("feats", "preact_feats")


class Doubt(UserError):
    """A network is not as others are; a method of the user's own may still work with it."""


@contextmanager
def explained(doubts: Sequence[Doubt]) -> Iterator[None]:
    """A context whose errors are explained by the first of `doubts`, if there are any.

    Raises:
        UserError: the doubt and, in short, the error.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if doubts and not out_of_memory(error):
            raise UserError(f"{doubts[0]} [{reason(error)}]") from error
        raise


class ReturnedFeatures(dict[str, Any]):
    """A network's features by name. Reading one that it does not return, or not so, is a UserError that names both."""

    def __init__(self, features: Mapping[str, Any], owner: str) -> None:
        super().__init__(features)
        self._owner = owner

    def __getitem__(self, name: str) -> Any:
        value = self.get(name)
        if name not in self:
            raise no_feature(name, self, self._owner)
        if name in _LISTS and not isinstance(value, (list, tuple)):
            raise UserError(f"{self._owner} returns {described(value)} as {name!r}; {_FEATURES}")
        return value


def no_feature(name: str, features: Any, owner: str) -> UserError:
    """The error for reading the feature `name` of the network `owner`, which returns other `features`."""
    has = ", ".join(map(repr, features)) if isinstance(features, Mapping) else described(features)
    return UserError(
        f"{owner} returns no feature {name!r}, which the method reads (it returns {has or 'none'}); add it to the "
        f"dictionary beside the logits: {_FEATURES}"
    )


def described(value: Any) -> str:
    """A network's output in words: the forms of its tensors, the names of its dictionaries."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dictionary {{{', '.join(map(str, value))}}}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} ({', '.join(map(described, value[:4]))}{', ...' if len(value) > 4 else ''})"
    return f"{type(value).__name__} {one_line(value, 60)}"


def check_output(output: Any, images: int, owner: str, classes: int = 0) -> Tensor:
    """The logits (B, C) of a network's output.

    Args:
        images: B.
        owner: the network, for the message.
        classes: C; 0 for any.

    Raises:
        Doubt: it is not (logits (B, C), features by name).
        UserError: the logits are NaN, or of other classes.
    """
    pair = isinstance(output, (tuple, list)) and len(output) == 2 and isinstance(output[1], Mapping)
    logits = output[0] if pair else None
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != images or not logits.is_floating_point():
        raise Doubt(f"{owner} returns {described(output)} for {images} images; {FORM}")
    if classes and logits.shape[1] != classes:
        raise UserError(
            f"{owner} returns logits of {logits.shape[1]} classes, but the data set has {classes}; let its constructor "
            "take num_classes, and end in a classifier of that width"
        )
    if logits.isnan().any():
        raise UserError(f"{owner} returns logits that are NaN; look into its weights, its checkpoint and its forward")
    return logits


def check_network(
    network: nn.Module, image: Tensor, owner: str, trains: bool = False, classes: int = 0
) -> Tensor:
    """The logits (B, C) of `network` for `image` (B, ...), in eval mode; nothing changes.

    Args:
        trains: it may return what is not fit in eval mode, such as the logits alone, if it is fit in its own mode.
        owner, classes: see `check_output`.

    Raises:
        Doubt, UserError: see `check_output` and `returned`.
    """
    output = returned(network, image, owner)
    try:
        return check_output(output, len(image), owner, classes)
    except UserError:
        if trains:
            with suppress(UserError):
                return check_output(_in_training(network, image), max(2, len(image)), owner, classes)
        raise


def tried(
    network: nn.Module, image: Tensor, owner: str, trains: bool = False, classes: int = 0
) -> Tensor | Doubt | None:
    """`check_network`, whose Doubt is returned, to be raised if a method does not work with the network.

    None: the network does not take any images alone. Its method may call it in another way; if it does not, its first
    step raises the same error.

    Raises:
        UserError: see `check_output`.
    """
    try:
        return check_network(network, image, owner, trains, classes)
    except Doubt as doubt:
        return doubt
    except UserError:
        raise
    except Exception:
        return None


def returned(network: nn.Module, image: Tensor, owner: str, images: str = "images") -> Any:
    """The output of `network` for `image` (B, ...), in eval mode; neither it nor the random generators change.

    Args:
        owner, images: what the network and the images are called, for the message.

    Raises:
        Doubt: it does not take such images, but others; says how to change them. An error that it raises for all images
            is a fault of its own, and stays what it is.
    """
    try:
        return _run(network, image)
    except Exception as error:
        remedy = next((words for words, change in _REMEDIES.items() if _takes(network, image, change)), None)
        if remedy is None:
            raise
        shape = ", ".join(["B", *map(str, image.shape[1:])])
        raise Doubt(
            f"{owner} does not take {images} ({shape}) {str(image.dtype).removeprefix('torch.')} "
            f"({one_line(error, 150)}); {remedy}"
        ) from error


def _in_training(network: nn.Module, image: Tensor) -> Any:
    """The output of `network` in the mode in which it is, on copies of its buffers; nothing changes."""
    if len(image) == 1:  # a BatchNorm behind 1x1 maps cannot train on one image
        image = image.expand(2, *image.shape[1:])
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with torch.no_grad(), _kept_generators(image):
        return functional_call(network, buffers, (image,))


def _run(network: nn.Module, image: Tensor) -> Any:
    with eval_mode(network), _kept_generators(image):
        return network(image)


def _kept_generators(image: Tensor) -> Any:
    return torch.random.fork_rng([image.device] if image.is_cuda else [])


def _resized(size: int) -> Callable[[Tensor], Tensor]:
    return lambda x: F.interpolate(x, (size, size))


# What may be changed in images that a network does not take: the next step -> the change.
_REMEDIES: dict[str, Callable[[Tensor], Tensor]] = {
    "give it floats: let the data set normalise its images and return them as float32": lambda x: x,
    "put the channels first: image.permute(2, 0, 1) in the data set": lambda x: x.permute(0, 3, 1, 2),
    "give it three channels: image.expand(3, -1, -1) in the data set": lambda x: x.expand(-1, 3, -1, -1),
    "give it images (3, H, W): image.expand(3, -1, -1) in the data set": lambda x: x[:, None].expand(-1, 3, -1, -1),
    "give it one channel, which it takes": lambda x: x[:, :1],
    "give it three of the channels, which it takes": lambda x: x[:, :3],
    **{
        f"it takes {size}x{size}: resize the images, or use a network for their size": _resized(size)
        for size in (32, 64, 224)
    },
}


def _takes(network: nn.Module, image: Tensor, change: Callable[[Tensor], Tensor]) -> bool:
    """Whether `network` takes the images as floats and with a `change`, which is one."""
    try:
        like = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
        changed = change(image.real.to(like.dtype))
        if changed.shape == image.shape and changed.dtype == image.dtype:
            return False
        _run(network, changed)
    except Exception:
        return False
    return True
