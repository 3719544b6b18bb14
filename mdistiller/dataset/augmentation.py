"""DATASET.AUGMENT: by which augmentation a data set's training images are seen, and the weak and the strong view.

Two of the names replace the data set's own augmentation, three stand on top of it:

    crop_flip        a random crop after padding by an eighth of the image size (4 of 32 pixels), and mirroring
    resized_crop     a random part of the image (8 to 100 % of its area), resized, and mirroring
    randaugment      the data set's own augmentation, then torchvision's RandAugment
    trivialaugment   the data set's own augmentation, then torchvision's TrivialAugmentWide
    fixmatch         the data set's own augmentation, then FixMatch's strong one

The weak view of an image is the augmentation without a policy, the strong one that with it: FixMatch's, as in the
recipe of MLKD, if the setting names none. Each of the two has a crop of its own, as in FixMatch (arXiv 2001.07685).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from ..registry import unknown_name
from .augment import Augment, CropFlip, ResizedCrop
from .image_file import read_pixels
from .policies import POLICIES, apply_drawn, apply_policy, draw_policy

View = Callable[[str], Tensor]
Transform = Callable[[Tensor], Tensor]
# The policy of the strong view, where the augmentation has none.
_STRONG = "fixmatch"


def padding_of(size: int) -> int:
    """Pixels by which images of `size` pixels are padded before they are cropped: 4 of 32, as is usual for CIFAR."""
    return max(1, size // 8)


@dataclass(frozen=True)
class OnTop:
    """The augmentation `under`, then a `policy` of `POLICIES`. Its last draws stay on the CPU, see `host_draws`."""

    under: Augment
    policy: str
    variants = None
    # Of its draws, the last ones that `apply` reads on the CPU.
    host_draws = 1

    @property
    def size(self) -> int:
        """Height and width of the images that it gives; 0: as they were."""
        return int(getattr(self.under, "size", 0))

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Those of `under`, then those of the policy."""
        return *self.under.draw(count, generator), draw_policy(self.policy, count, generator)

    def apply(self, images: Tensor, *draws: Tensor) -> Tensor:
        """See `Augment.apply`."""
        return apply_drawn(self.policy, self.under.apply(images, *draws[:-1]), draws[-1])

    def variant(self, *draws: Tensor) -> Tensor:
        """Must not be called: `variants` is None."""
        raise AssertionError("what a policy gives is not numbered")


def batch_augment(name: str, own: Augment, size: int) -> Augment:
    """The augmentation `name` of images in memory, whose data set's own is `own`.

    Args:
        size: height and width that a network sees.

    Raises:
        UserError: no such augmentation.
    """
    if name == "crop_flip":
        return CropFlip(padding_of(size))
    if name == "resized_crop":
        return ResizedCrop(size)
    _check(name)
    return OnTop(own.under if isinstance(own, OnTop) else own, name)


def weak_and_strong(augment: Augment) -> tuple[Augment, Augment]:
    """The augmentations of the weak and of the strong view; one of the two is `augment` itself."""
    if isinstance(augment, OnTop):
        return augment.under, augment
    return augment, OnTop(augment, _STRONG)


@dataclass(frozen=True)
class FileView:
    """The view of an image file: path -> (H, W, 3) uint8, in three steps.

    Attributes:
        read: path -> the whole image (H, W, 3) uint8, without randomness.
        transform: of that image, to the size that a network sees; it draws from torch's CPU generator.
        policy: of `POLICIES`, on top; empty: none.
        interpolation: of the crops by which DATASET.AUGMENT replaces `transform`.
    """

    read: Callable[[str], Any]
    transform: Callable[[Any], Tensor]
    policy: str = ""
    interpolation: str = "bilinear"

    def __call__(self, path: str) -> Tensor:
        return self.show(self.read(path))

    def show(self, image: Any) -> Tensor:
        """The view of an image that has been read."""
        shown = self.transform(image)
        return apply_policy(self.policy, shown) if self.policy else shown


def file_view(view: View) -> FileView:
    """`view` as a `FileView`: another object may tell its `read` and `transform`; of a function, all steps are one."""
    if isinstance(view, FileView):
        return view
    read, transform = (getattr(view, name, None) for name in ("read", "transform"))
    return FileView(read, transform) if callable(read) and callable(transform) else FileView(_path, view)


def _path(path: str) -> str:
    """The reading of a view that reads for itself."""
    return path


def view_by(name: str, own: View, size: int) -> FileView:
    """The view by the augmentation `name` of image files, whose data set's own view is `own`.

    Args:
        size: height and width that a network sees.

    Raises:
        UserError: no such augmentation.
    """
    view = file_view(own)
    if name in POLICIES:
        return replace(view, policy=name)
    transform = transform_of(name, size, view.interpolation)
    return replace(view, read=read_pixels if view.read is _path else view.read, transform=transform, policy="")


def weak_and_strong_views(view: View) -> tuple[FileView, FileView]:
    """The weak and the strong view of image files; one of the two is `view` itself."""
    own = file_view(view)
    return (replace(own, policy=""), own) if own.policy else (own, replace(own, policy=_STRONG))


def transform_of(name: str, size: int, interpolation: str = "bilinear", mirror: bool = True) -> Transform:
    """"crop_flip" or "resized_crop" of one image: (H, W, 3) uint8 of any size -> (size, size, 3).

    It can be pickled, and draws from torch's CPU generator. For crop_flip, the image's short side is resized to `size`
    first.

    Args:
        mirror: whether to mirror at all.

    Raises:
        UserError: no such augmentation, or it is a policy, which has no size.
    """
    mode, flip = InterpolationMode(interpolation), [v2.RandomHorizontalFlip()] if mirror else []
    if name == "resized_crop":
        return PixelTransform(v2.Compose([v2.RandomResizedCrop(size, interpolation=mode), *flip]))
    if name == "crop_flip":
        crop = v2.RandomCrop(size, padding=padding_of(size))
        return PixelTransform(v2.Compose([v2.Resize(size, interpolation=mode), crop, *flip]))
    raise unknown_name("augmentation (DATASET.AUGMENT)", name, ["crop_flip", "resized_crop"])


@dataclass(frozen=True)
class PixelTransform:
    """A torchvision transform of tensors (3, H, W), for (H, W, 3) uint8."""

    transform: Any

    def __call__(self, image: Tensor) -> Tensor:
        shown: Tensor = self.transform(image.permute(2, 0, 1)).permute(1, 2, 0)
        return shown


def _check(name: str) -> None:
    if name not in POLICIES:
        raise unknown_name("augmentation (DATASET.AUGMENT)", name, ["crop_flip", "resized_crop", *POLICIES])
