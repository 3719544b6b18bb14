"""Image files, one folder a class: read, transformed and batched by worker processes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ..errors import UserError
from ._base import Batch, Loader, mix_seed
from .augment import Augment
from .augmentation import FileView, View, batch_augment, file_view, view_by, weak_and_strong_views
from .batch import FIELDS, VIEWS, HostIndex, to_device, with_host_index
from .drawn import DrawnViews
from .image_file import BrokenImageError, silent_pillow, warn_of_broken
from .in_memory import Normalize
from .listing import LabelledFiles, class_folders, labelled_files
from .pixels import check_pixels
from .worker_failures import RefusedError
from .workers import started

__all__ = ["FolderLoader", "ImageFiles", "class_folders", "cpu_seed", "labelled_files"]


@dataclass(frozen=True)
class ImageFiles:
    """A split of image files.

    Attributes:
        paths: (N,) bytes. An array, because a list of a million strings is copied into every worker, a page at a time.
        targets: (N,) int64.
        train_view: path -> (H, W, 3) uint8, augmented; its randomness must come from torch's CPU generator.
        val_view: path -> (H, W, 3) uint8, without randomness.
        mean, std: per channel, of values in [0, 1].
        skip_broken: skip the files that cannot be read; see `FolderLoader`.
        class_names: the name of every class, by label; empty if they are unknown.
        augment: augments batches of the views on the training device, as those of an `ImageArray`; the `train_view` is
            then without randomness. None: the `train_view` augments.
    """

    paths: np.ndarray
    targets: Tensor
    train_view: View
    val_view: View
    mean: Sequence[float]
    std: Sequence[float]
    skip_broken: bool = False
    class_names: Sequence[str] = ()
    augment: Augment | None = None

    @classmethod
    def of(cls, files: Sequence[tuple[str, int]], *args: Any, **kwargs: Any) -> ImageFiles:
        """From (path, label) pairs; the other arguments are the attributes. `labelled_files` brings `class_names`."""
        paths = np.array([os.fsencode(path) for path, _ in files])
        data = cls(paths, torch.tensor([label for _, label in files]), *args, **kwargs)
        if data.class_names or not isinstance(files, LabelledFiles):
            return data
        return replace(data, class_names=files.class_names)

    def select(self, keep: Tensor) -> ImageFiles:
        """The images with the indices `keep`."""
        return replace(self, paths=self.paths[keep.numpy()], targets=self.targets[keep])

    def augmented(self, name: str, size: int) -> ImageFiles:
        """The same images, augmented as DATASET.AUGMENT `name` says, for networks that see `size` pixels."""
        if self.augment is not None:
            return replace(self, augment=batch_augment(name, self.augment, size))
        return replace(self, train_view=view_by(name, self.train_view, size))

    def loader(self, batch_size: int, num_workers: int, train: bool, seed: int = 0) -> FolderLoader:
        """Batches, read by `num_workers` processes, or by this one if 0."""
        return FolderLoader(self, batch_size, num_workers, train, seed)


@contextmanager
def cpu_seed(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator with `seed`; on exit, restore its state from before."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


class _Batches(Dataset[tuple[Batch | UserError, dict[str, str]]]):
    """A batch for each key (epoch, indices); the key carries the epoch to persistent workers.

    The indices are an array, because a tensor would go to the worker through shared memory.

    Returns the batch (image, target, index) with images (B, H, W, 3) uint8, or () if no file could be read, and what
    is wrong with each broken file, by path. In place of a batch, the error of a view that returns no such image.

    Args:
        other: another view of each training image, which comes last in the batch; None: there is none.
    """

    def __init__(self, data: ImageFiles, train: bool, seed: int, other: FileView | None = None) -> None:
        self.data, self.train, self.seed, self.other = data, train, seed, other

    def __getitem__(self, key: tuple[int, np.ndarray]) -> tuple[Batch | UserError, dict[str, str]]:
        try:
            return self._batch(*key)
        except RefusedError:  # `started` says what to do
            raise
        except UserError as error:  # of what a worker raises, a DataLoader makes a traceback
            return error, {}

    def _batch(self, epoch: int, indices: np.ndarray) -> tuple[Batch, dict[str, str]]:
        broken: dict[str, str] = {}
        shown = []
        with silent_pillow():
            for index in indices.tolist():
                shown += self._show(epoch, index, broken)
                if broken and not self.data.skip_broken:
                    return (), broken
        if not shown:
            return (), broken
        places = torch.tensor([place for place, _ in shown])
        image, *others = zip(*(images for _, images in shown))
        for images in (image, *others):
            self._check(places, list(images))
        # By a worker, in shared memory.
        stacked, *others = (default_collate(list(images)) for images in (image, *others))
        return (stacked, self.data.targets[places], places, *others), broken

    def _check(self, places: Tensor, images: list[Tensor]) -> None:
        """Refuse what a view has returned unless all are (H, W, 3) uint8 of one size."""
        view = "train_view" if self.train else "val_view"
        for place, image in zip(places.tolist(), images):
            name = f"ImageFiles.{view}, for {os.fsdecode(self.data.paths[place])},"
            check_pixels(image, "(H, W, 3)", name)
            if image.shape != images[0].shape:
                raise UserError(
                    f"{name} returns {tuple(image.shape)} after {tuple(images[0].shape)} for another file; the images "
                    "of a batch must have one size: crop or resize them in the view"
                )

    def _show(self, epoch: int, index: int, broken: dict[str, str]) -> list[tuple[int, list[Tensor]]]:
        """Index and views of image `index`, or in training of the first intact one after it; [] if there is none."""
        count = len(self.data.paths)
        for step in range(count if self.train and self.data.skip_broken else 1):
            place = (index + step) % count
            path = os.fsdecode(self.data.paths[place])
            try:
                return [(place, self._views(epoch, index, path))]
            except BrokenImageError as error:
                broken[path] = str(error)
        return []

    def _views(self, epoch: int, index: int, path: str) -> list[Tensor]:
        """The view of an image, and the other one if there is one; the file is read once."""
        if not self.train:
            return [self.data.val_view(path)]
        view = file_view(self.data.train_view)
        image = view.read(path)
        # index + 1, because trailing zeros do not change a seed, and (seed, epoch) alone seeds the order.
        with cpu_seed(mix_seed(self.seed, epoch, index + 1)):
            shown = [view.show(image)]
        if self.other is not None:
            with cpu_seed(mix_seed(self.seed, epoch, index + 1, 1)):
                shown.append(self.other.show(image))
        return shown


class FolderLoader(Loader):
    """Batches of `ImageFiles`; persistent workers return uint8 images, which are normalised on the device.

    With `skip_broken`, training replaces a broken image by the next intact one of the list (mostly of its class), with
    that one's label and index: batches stay full, on all ranks, and the same from run to run. Validation leaves broken
    images out. A warning at the end of each pass gives their number.

    Attributes:
        broken: what is wrong with each broken file met so far, by path.
    """

    def __init__(self, data: ImageFiles, batch_size: int, num_workers: int, train: bool, seed: int = 0) -> None:
        super().__init__(data.targets, batch_size, train, seed, data.class_names, data.mean, data.std)
        if num_workers < 0:
            raise UserError(f"the number of workers must be at least 0, it is {num_workers}")
        self.broken: dict[str, str] = {}
        self._data = data
        self._normalize: Normalize | None = None
        self._keys: list[tuple[int, np.ndarray]] = []
        self._num_workers = num_workers
        self._views: tuple[FileView, FileView] | None = None
        augment = data.augment if train else None
        self._drawn = None if augment is None else DrawnViews(augment, len(data.targets), seed)

    @property
    def _image_is_weak(self) -> bool:
        """Whether `image` is the weak view."""
        return self._drawn.image_is_weak if self._drawn else not file_view(self._data.train_view).policy

    def with_views(self) -> FolderLoader:
        """Yield `image_weak` and `image_strong` too from now on, see `augmentation`; returns self.

        One of them is `image`. The other one's draws come from the same seed, epoch and index.
        """
        if self._drawn:
            self._drawn.with_views()
        else:
            self._views = weak_and_strong_views(self._data.train_view)
        self.fields = (*FIELDS, *VIEWS)
        self.__dict__.pop("_loader", None)
        return self

    @cached_property
    def _loader(self) -> DataLoader[Any]:
        """Made at the first pass, when the device is known: only a GPU takes batches from pinned memory."""
        other = self._views[self._image_is_weak] if self._views else None
        return DataLoader(
            _Batches(self._data, self.train, self.seed, other),
            sampler=self._keys,
            batch_size=None,
            num_workers=self._num_workers,
            persistent_workers=self._num_workers > 0,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # so that the global generator is not used
        )

    def to(self, device: torch.device | str) -> FolderLoader:
        """Yield the batches on `device` from now on; returns self. Workers that run already are replaced."""
        if torch.device(device) != self.device:
            self.__dict__.pop("_loader", None)
        super().to(device)
        return self

    def _batches(self, shares: list[slice]) -> Iterator[Batch]:
        order = self._order()
        return self._read([(self.epoch, order[share]) for share in shares])

    def _read(self, keys: list[tuple[int, Tensor]]) -> Iterator[Batch]:
        """Read the batches of `keys` and bring them to the device.

        Raises:
            UserError: a file is broken and `skip_broken` is off, or all files are broken; or a worker fails.
        """
        self._keys[:] = [(epoch, indices.numpy()) for epoch, indices in keys]
        following = [*keys[1:], (0, torch.empty(0, dtype=torch.int64))]
        met: dict[str, str] = {}
        for (fields, broken), (epoch, _), (_, foreseen) in zip(self._started(), keys, following):
            if isinstance(fields, UserError):
                raise fields
            met |= broken
            if broken and not self._data.skip_broken:
                raise BrokenImageError(next(iter(broken.values())) + ", or set DATASET.SKIP_BROKEN True")
            if fields:
                yield self._on_device(fields, foreseen, epoch)
            elif self.train:
                raise UserError(f"none of the {len(self.targets)} training images can be read: {met.popitem()[1]}")
        self.broken |= met
        if met:
            what = "were replaced by the next intact ones" if self.train else "were left out"
            warn_of_broken(met, len(self.targets), f"{what} (DATASET.SKIP_BROKEN)")

    def _started(self) -> Iterator[tuple[Batch | UserError, dict[str, str]]]:
        if self.device.type != "cuda":
            return started(self._loader, "DATASET.NUM_WORKERS")
        with torch.cuda.device(self.device):  # the thread that pins memory works on the current one
            return started(self._loader, "DATASET.NUM_WORKERS")

    def _on_device(self, fields: Batch, foreseen: Tensor, epoch: int) -> Batch:
        image, target, index, *others = fields
        shown = [to_device(images, self.device) for images in (image, *others)]
        if self._drawn:
            shown = self._drawn(shown[0], index, epoch)
        image, *others = (self._normalized(images) for images in shown)
        target = to_device(target, self.device)
        if not self.train:
            return image, target
        index = with_host_index(to_device(index, self.device), HostIndex(index, foreseen))
        views = [image, *others] if self._image_is_weak else [*others, image]
        return (image, target, index, *views) if others else (image, target, index)

    def _normalized(self, images: Tensor) -> Tensor:
        if self._normalize is None:
            self._normalize = Normalize(self._data.mean, self._data.std, pixels=images[0, :, :, 0].numel())
        return self._normalize.to(self.device)(images)

    def _order(self) -> Tensor:
        count = len(self.targets)
        if not self.train:
            return torch.arange(count)
        return torch.randperm(count, generator=torch.Generator().manual_seed(mix_seed(self.seed, self.epoch)))
