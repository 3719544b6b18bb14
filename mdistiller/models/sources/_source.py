"""What every source of networks can do, and the images that a network was made for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch.nn as nn

from ...console import reason
from ...errors import UserError
from ...registry import near_names


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


IMAGENET = NativeInput(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), crop=0.875)


class Source:
    """Where networks come from: a library, a folder of ours, a user's file. `name` is without the source's prefix.

    Attributes:
        wraps: whether its networks give logits alone, and are wrapped.
    """

    wraps = True

    def build(self, name: str, num_classes: int, image_size: int, pretrained: bool) -> nn.Module:
        """The network with `num_classes` logits, for images of `image_size` (0: its own), as the source makes it.

        Args:
            pretrained: with the weights that the source publishes; where they are for other classes, all but the head.

        Raises:
            UserError: no such network or weights, or it cannot be made so.
        """
        raise NotImplementedError

    def native_input(self, name: str, image_size: int = 0) -> NativeInput:
        """The images that the network was made for; see `native.native_input`."""
        raise NotImplementedError

    def num_classes(self, name: str) -> int:
        """The classes of the published weights, or those that the network has by default; 0 where nothing tells."""
        raise NotImplementedError

    def names(self) -> list[str]:
        """Its networks, with the source's prefix; [] where they cannot be listed."""
        return []


def unknown_network(name: str, prefix: str, known: Iterable[str]) -> UserError:
    """The error for a `name` that a large source does not know; it names near ones and the command that lists all."""
    near = near_names(name, known)
    hint = f"did you mean {' or '.join(prefix + own for own in near)}?" if near else "no name resembles it"
    return UserError(f"unknown network {prefix + name!r}; {hint} (`mdistiller models '{prefix}*'` lists all)")


@contextmanager
def loading(name: str, where: str) -> Iterator[None]:
    """Turn an error of the `with` block, which loads published weights from `where`, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of the network, of the disk, of a damaged file: libraries raise all types
        raise UserError(
            f"cannot load the published weights of {name} from {where} ({reason(error)}); connect to the network, or "
            "name a file: DISTILLER.TEACHER_CKPT, STUDENT_CKPT, tools/eval.py -c"
        ) from error
