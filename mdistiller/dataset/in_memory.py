"""Small images as uint8 tensors on the training device, augmented and normalised a batch at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ._base import Batch, Loader
from .augment import Augment, CropFlip
from .augmentation import batch_augment, weak_and_strong
from .batch import FIELDS, VIEWS, HostIndex, to_device, with_host_index
from .drawn import epoch_draws, placed, view_draws
from .pixels import check_pixels

CROP_AND_FLIP = CropFlip()


class Normalize:
    """uint8 (B, H, W, C) -> float32 (B, C, H, W), channels last in memory: (x / 255 - mean) / std.

    The operations and their order are those of torchvision's ToTensor and Normalize, so the result has the same bits.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], pixels: int) -> None:
        # Repeated for every pixel: a last dimension of three would keep the CPU from vectorising.
        self.mean = torch.tensor(mean, dtype=torch.float32).repeat(pixels)
        self.std = torch.tensor(std, dtype=torch.float32).repeat(pixels)
        # A tensor, because CUDA multiplies by 1 / 255 when the divisor is a number, which rounds differently.
        self.full = torch.tensor(255.0)

    def to(self, device: torch.device | str) -> Normalize:
        """Work on `device` from now on; returns self."""
        self.mean, self.std, self.full = (t.to(device) for t in (self.mean, self.std, self.full))
        return self

    def __call__(self, images: Tensor) -> Tensor:
        flat = images.reshape(len(images), -1).float()
        return flat.div_(self.full).sub_(self.mean).div_(self.std).view(images.shape).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class ImageArray:
    """A split held in memory.

    Attributes:
        images: (N, H, W, 3) uint8.
        targets: (N,) int64.
        mean, std: per channel, of values in [0, 1].
        augment: applied in training; by default random crops after padding with 4 zeros, and random mirroring.
        class_names: the name of every class, by label; empty if they are unknown.

    Raises:
        UserError: the images are not of that type and shape; says how to make them so.
    """

    images: Tensor
    targets: Tensor
    mean: Sequence[float]
    std: Sequence[float]
    augment: Augment = CROP_AND_FLIP
    class_names: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_pixels(self.images, "(N, H, W, 3)", "ImageArray.images")

    def select(self, keep: Tensor) -> ImageArray:
        """The images with the indices `keep`."""
        return replace(self, images=self.images[keep], targets=self.targets[keep])

    def augmented(self, name: str, size: int) -> ImageArray:
        """The same images, augmented as DATASET.AUGMENT `name` says, for networks that see `size` pixels."""
        return replace(self, augment=batch_augment(name, self.augment, size))

    def loader(self, batch_size: int, num_workers: int, train: bool, seed: int = 0) -> InMemoryLoader:
        """Batches; `num_workers` is ignored."""
        return InMemoryLoader(self, batch_size, train, seed)


class InMemoryLoader(Loader):
    """Batches of an `ImageArray`, in training augmented on the device.

    An epoch's random draws are all made at its start, on the CPU for every device: about 30 bytes an image, 200 for
    resized crops.
    """

    def __init__(self, data: ImageArray, batch_size: int, train: bool, seed: int = 0) -> None:
        super().__init__(data.targets, batch_size, train, seed, data.class_names, data.mean, data.std)
        self.augment = data.augment
        self.variants = data.augment.variants if train else None
        self._recipe = f"{data.mean} {data.std} {data.augment if train else None}"
        self._images = data.images.contiguous()
        self._labels = data.targets
        size = getattr(data.augment, "size", 0) if train else 0
        height, width = (size, size) if size else data.images.shape[1:3]
        self._normalize = Normalize(data.mean, data.std, pixels=height * width)
        self.image_size = height if height == width else 0
        self._drawn: tuple[tuple[int, int], tuple[Tensor, ...]] | None = None
        self._views: tuple[Augment, Augment] | None = None
        self._drawn_view: tuple[Tensor, ...] = ()

    def to(self, device: torch.device | str) -> InMemoryLoader:
        """Move the images to `device` and work there from now on; returns self."""
        super().to(device)
        self._images, self._labels = self._images.to(device), self._labels.to(device)
        self._normalize.to(device)
        self._drawn = None
        return self

    def draw(self) -> tuple[Tensor, ...]:
        """This epoch's order, and the draws of the augmentation for every image, on the CPU."""
        return epoch_draws(self.augment, len(self.targets), self.seed, self.epoch)

    def _draws(self) -> tuple[Tensor, ...]:
        """`draw()`, made once an epoch: the order on the CPU, and the rest where the augmentation reads it."""
        key = self.seed, self.epoch
        if self._drawn is None or self._drawn[0] != key:
            order, *draws = self.draw()
            self._drawn = key, (order, *placed(self.augment, draws, self.device))
            if self._views is not None:
                other = self._other_view
                drawn = view_draws(other, len(self.targets), self.seed, self.epoch)
                self._drawn_view = placed(other, drawn, self.device)
        return self._drawn[1]

    def with_views(self) -> InMemoryLoader:
        """Yield `image_weak` and `image_strong` too from now on, see `augmentation`; returns self.

        One of them is `image`. The other one's draws come from the same seed, epoch and index.
        """
        self._views, self._drawn = weak_and_strong(self.augment), None
        self.fields = (*FIELDS, *VIEWS)
        return self

    @property
    def _other_view(self) -> Augment:
        """The augmentation of the view that is not `image`."""
        assert self._views is not None
        return next(view for view in self._views if view is not self.augment)

    def variant(self, index: Tensor) -> Tensor:
        """Which of the `variants` each image of `index` (B,) has in this epoch: (B,) int64 on the device.

        The same image in the same variant has the same pixels, bit for bit, in every epoch and for every seed.
        """
        index = index.to(self.device)
        return self.augment.variant(*(drawn[index] for drawn in self._draws()[1:]))

    def own_images(self) -> Tensor:
        """(M,) int64 on the device: the images that this rank sees in this epoch, in their order."""
        order = self._draws()[0]
        return to_device(torch.cat([order[share] for share in self._shares(0)]), self.device)

    def augmented(self, index: Tensor) -> Tensor:
        """(B, 3, H, W) float32: the images of `index` (B,) as they come in this epoch's batches, bit for bit."""
        index = index.to(self.device)
        draws = self._draws()[1:]
        host = index.cpu() if getattr(self.augment, "host_draws", 0) else index
        return self._made(index, self.augment, [_taken(drawn, index, host) for drawn in draws])

    def _made(self, index: Tensor, augment: Augment, draws: Sequence[Tensor]) -> Tensor:
        """The images of `index` (B,), augmented by their draws (B, ...), and normalised."""
        return self._normalize(augment.apply(self._images[index], *draws))

    @cached_property
    def fingerprint(self) -> str:
        """A digest of images, labels, normalisation and augmentation: a cache key for what is computed from them."""
        digest = hashlib.sha256()
        for tensor in (self._images, self._labels):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().numpy().data)
        digest.update(self._recipe.encode())
        return digest.hexdigest()

    def _batches(self, shares: list[slice]) -> Iterator[Batch]:
        return self._train_batches(shares, *self._draws()) if self.train else self._val_batches(shares)

    def _train_batches(self, shares: list[slice], order: Tensor, *draws: Tensor) -> Iterator[Batch]:
        on_device = to_device(order, self.device)
        # In the epoch's order, so that a batch takes slices, which are no operations on the device.
        labels, *ordered = (_taken(every, on_device, order) for every in (self._labels, *draws))
        view = [_taken(every, on_device, order) for every in self._drawn_view] if self._views else None
        for share, following in zip(shares, [*shares[1:], slice(0)]):
            index = with_host_index(on_device[share], HostIndex(order[share], order[following]))
            image = self._made(index, self.augment, [drawn[share] for drawn in ordered])
            if view is None:
                yield image, labels[share], index
            else:
                other = self._made(index, self._other_view, [drawn[share] for drawn in view])
                yield image, labels[share], index, *self._in_order(image, other)

    def _in_order(self, image: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """The weak and the strong view."""
        assert self._views is not None
        return (image, other) if self._views[0] is self.augment else (other, image)

    def _val_batches(self, shares: list[slice]) -> Iterator[Batch]:
        for share in shares:
            yield self._normalize(self._images[share]), self._labels[share]


def _taken(every: Tensor, index: Tensor, host: Tensor) -> Tensor:
    """The entries of `every` at `index` (B,), which is also known on the CPU."""
    return every[index if every.device == index.device else host]
