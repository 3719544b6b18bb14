"""A frozen network that sees the images of a run as it was made to: normalised by its own mean and std, at its size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..console import network_name
from .native import NativeInput


class OwnInput(nn.Module):
    """`network` behind the change from the data's normalisation to its own, and behind a resize.

    An image x, normalised by the data's mean m and std s, is (x * s + m - m') / s' by the network's own m' and s': one
    multiply-add a pixel. The resize antialiases as Pillow's and timm's do, and comes second: it is linear, and a
    constant image stays what it is, so that the order does not matter.

    The state dict is the network's, and so is every attribute that this module does not have.

    Args:
        network: image (B, 3, H, W) -> whatever it returns.
        mean, std: per channel, of values in [0, 1], by which the data is normalised.
        own: the images that the network was made for.
        size: height and width to which images are resized; 0: they are not.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, network: nn.Module, mean: Sequence[float], std: Sequence[float], own: NativeInput, size: int = 0
    ) -> None:
        super().__init__()
        self.network, self.size, self.interpolation = network, size, own.interpolation
        m, s, own_m, own_s = (torch.tensor(values, dtype=torch.float64) for values in (mean, std, own.mean, own.std))
        like = next(network.parameters(), torch.empty(0))
        for name, value in (("scale", s / own_s), ("shift", (m - own_m) / own_s)):
            self.register_buffer(name, value.to(like.device, like.dtype)[:, None, None], persistent=False)

    @property
    def name(self) -> str:
        """What messages call it: as the network."""
        return network_name(self.network)

    def forward(self, image: Tensor) -> Any:
        """What the network returns for `image` (B, 3, H, W), normalised as the data is."""
        return self.network(self.seen(image))

    def seen(self, image: Tensor) -> Tensor:
        """`image` (B, 3, H, W) as the network sees it."""
        image = torch.addcmul(self.shift, image, self.scale)
        if self.size and tuple(image.shape[2:]) != (self.size, self.size):
            image = F.interpolate(image, (self.size, self.size), mode=self.interpolation, antialias=True)
        return image

    def around(self, network: nn.Module) -> OwnInput:
        """The same in front of another `network`, which then computes what this one's does."""
        other = OwnInput.__new__(OwnInput)
        nn.Module.__init__(other)
        other.network, other.size, other.interpolation = network, self.size, self.interpolation
        for name in ("scale", "shift"):
            other.register_buffer(name, getattr(self, name), persistent=False)
        return other

    def extra_repr(self) -> str:
        """In full precision: the key of the teacher's cache depends on it."""
        numbers = [[float(value) for value in tensor.flatten()] for tensor in (self.scale, self.shift)]
        return f"scale={numbers[0]}, shift={numbers[1]}, size={self.size}, interpolation={self.interpolation}"

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.network.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.network.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Called when the state of a module is loaded of which this one is a part."""
        for name in [name for name in state_dict if name.startswith(prefix)]:
            state_dict[f"{prefix}network.{name.removeprefix(prefix)}"] = state_dict.pop(name)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "network":  # of one that is not built yet
                raise
            return getattr(self.network, name)


def with_own_input(
    network: nn.Module, mean: Sequence[float], std: Sequence[float], own: NativeInput, size: int = 0
) -> nn.Module:
    """`OwnInput` where it changes anything, else `network` itself; the arguments are those of `OwnInput`."""
    m, own_m, s, own_s = ([*map(float, values)] for values in (mean, own.mean, std, own.std))
    return network if (m, s) == (own_m, own_s) and not size else OwnInput(network, mean, std, own, size)


def pixels_seen(network: nn.Module, image: Tensor) -> int:
    """The number of pixels of one image of `image` (B, 3, H, W) as a network sees it."""
    size = network.size if isinstance(network, OwnInput) else 0
    return size * size or image.shape[2:].numel()
