"""The images that a network was made for: their size and normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..registry import Registry, unknown_name
from .cifar import cifar_model_dict, tiny_imagenet_model_dict
from .imagenet import imagenet_model_dict


@dataclass(frozen=True)
class NativeInput:
    """The images that a network was made for.

    Attributes:
        size: height and width, in pixels.
        mean, std: per channel, of values in [0, 1], by which they are normalised.
        crop: share of the resized image's height and width that validation keeps, in (0, 1].
        interpolation: of that resizing: "bilinear" or "bicubic".
    """

    size: int
    mean: Sequence[float]
    std: Sequence[float]
    crop: float = 1.0
    interpolation: str = "bilinear"


_IMAGENET = NativeInput(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), crop=0.875)
# Model family -> its networks, and the images that they were made for; in the order in which a name is looked for.
FAMILIES: dict[str, tuple[Registry, NativeInput]] = {
    "imagenet": (imagenet_model_dict, _IMAGENET),
    "cifar": (cifar_model_dict, NativeInput(32, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))),
    "tiny_imagenet": (tiny_imagenet_model_dict, NativeInput(64, (0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262))),
}


def family_of(name: str, image_size: int = 0) -> str:
    """The model family in which the network `name` is found.

    Args:
        image_size: of the data, in pixels, which chooses among several families: the one made for the nearest size.
            0: the first of `FAMILIES`.

    Raises:
        UnknownNameError: no family has such a network; the message suggests similar names.
    """
    having = [family for family, (models, _) in FAMILIES.items() if name in models]
    if not having:
        raise unknown_name("network", name, {known for models, _ in FAMILIES.values() for known in models})
    return min(having, key=lambda family: abs(FAMILIES[family][1].size - image_size)) if image_size else having[0]


def native_input(name: str, image_size: int = 0) -> NativeInput:
    """The images that the network `name` was made for; see `family_of`."""
    return FAMILIES[family_of(name, image_size)][1]
