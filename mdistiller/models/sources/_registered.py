"""The networks of this library, by bare names."""

from __future__ import annotations

from inspect import Parameter, signature

import torch.nn as nn

from ...errors import UserError
from ...registry import Registry, unknown_name
from ..build import build_model
from ..cifar import cifar_model_dict, tiny_imagenet_model_dict
from ..imagenet import imagenet_model_dict
from ._source import IMAGENET, NativeInput, Source

# Model family -> its networks, and the images that they were made for; in the order in which a name is looked for.
FAMILIES: dict[str, tuple[Registry, NativeInput]] = {
    "imagenet": (imagenet_model_dict, IMAGENET),
    "cifar": (cifar_model_dict, NativeInput(32, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))),
    "tiny_imagenet": (tiny_imagenet_model_dict, NativeInput(64, (0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262))),
}
_CLASSES = {"imagenet": 1000, "cifar": 100, "tiny_imagenet": 200}


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


class Registered(Source):
    wraps = False

    def build(self, name: str, num_classes: int, image_size: int, pretrained: bool) -> nn.Module:
        models, _ = FAMILIES[family_of(name, image_size)]
        if not pretrained:
            return build_model(models, name, num_classes)
        entry = models[name]
        if isinstance(entry, tuple) or not _takes(entry, "pretrained"):
            raise UserError(f"{name} fetches no weights itself; name their file: DISTILLER.TEACHER_CKPT, STUDENT_CKPT")
        return build_model(models, name, num_classes, pretrained=True)

    def native_input(self, name: str, image_size: int = 0) -> NativeInput:
        return FAMILIES[family_of(name, image_size)][1]

    def num_classes(self, name: str) -> int:
        return _CLASSES[family_of(name)]

    def names(self) -> list[str]:
        return sorted({name for models, _ in FAMILIES.values() for name in models})


def _takes(constructor: object, parameter: str) -> bool:
    """Whether a constructor takes a parameter; one that a user has registered may not."""
    parameters = signature(constructor).parameters.values()  # type: ignore[arg-type]
    return any(p.name == parameter or p.kind is Parameter.VAR_KEYWORD for p in parameters)
