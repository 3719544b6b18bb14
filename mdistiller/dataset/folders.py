"""Image files, one folder a class: read, transformed and batched by worker processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..errors import UserError
from ._base import Batch, Loader, mix_seed

Transform = Callable[[Image.Image], Tensor]


def class_folders(folder: Path, num_classes: int) -> list[str]:
    """Names of the folders in `folder`, sorted: their order is the order of the labels.

    Raises:
        UserError: there are not `num_classes` of them; with some missing, every label would shift.
    """
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if len(names) != num_classes:
        raise UserError(f"{folder} has {len(names)} class folders, {num_classes} are due (empty ones count)")
    return names


def labelled_files(folder: Path, classes: Sequence[str]) -> list[tuple[str, int]]:
    """(path, label) of every image at any depth below `folder`/<class>, by class and then by path."""
    found = []
    for label, name in enumerate(classes):
        for where, folders, files in os.walk(folder / name):
            folders.sort()
            images = (f for f in sorted(files) if f.lower().endswith(IMG_EXTENSIONS))
            found += [(os.path.join(where, f), label) for f in images]
    if not found:
        raise UserError(f"no image in the class folders of {folder}")
    return found


@dataclass(frozen=True)
class ImageFiles:
    """A split of image files.

    Attributes:
        paths: (N,) bytes. An array, because a list of a million strings is copied into every worker, a page at a time.
        targets: (N,) int64.
        train_transform: image -> (3, H, W) float32; its randomness must be torch's, on the CPU.
        val_transform: the same without chance.
    """

    paths: np.ndarray
    targets: Tensor
    train_transform: Transform
    val_transform: Transform

    @classmethod
    def of(cls, files: Sequence[tuple[str, int]], train_transform: Transform, val_transform: Transform) -> ImageFiles:
        """From (path, label) pairs."""
        paths = np.array([os.fsencode(path) for path, _ in files])
        return cls(paths, torch.tensor([label for _, label in files]), train_transform, val_transform)

    def select(self, keep: Tensor) -> ImageFiles:
        """The images at the places `keep`."""
        return replace(self, paths=self.paths[keep.numpy()], targets=self.targets[keep])

    def loader(self, batch_size: int, num_workers: int, train: bool, seed: int = 0) -> FolderLoader:
        """Batches, read by `num_workers` processes, or by this one if 0."""
        return FolderLoader(self, batch_size, num_workers, train, seed)


def read_image(path: str) -> Image.Image:
    """The RGB image of a file, grey ones included.

    Raises:
        UserError: the file is missing or broken.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}); put the whole file there") from error


@contextmanager
def cpu_seed(seed: int) -> Iterator[None]:
    """Torch's random numbers on the CPU start at `seed` inside and go on as if nothing had been outside."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


class _Batches(Dataset[Batch]):
    """Whole batches by their key (epoch, indices); the key brings the epoch to workers that outlive it."""

    def __init__(self, data: ImageFiles, train: bool, seed: int) -> None:
        self.data, self.train, self.seed = data, train, seed

    def __getitem__(self, key: tuple[int, Tensor]) -> Batch:
        epoch, indices = key
        image = torch.stack([self._image(epoch, i) for i in indices.tolist()])
        return (image, self.data.targets[indices], indices)[: 3 if self.train else 2]

    def _image(self, epoch: int, index: int) -> Tensor:
        image = read_image(os.fsdecode(self.data.paths[index]))
        if not self.train:
            return self.data.val_transform(image)
        # index + 1, because a trailing zero is as good as nothing in a seed: (seed, epoch) makes the order.
        with cpu_seed(mix_seed(self.seed, epoch, index + 1)):
            return self.data.train_transform(image)


class FolderLoader(Loader):
    """Batches of `ImageFiles`; the workers stay from epoch to epoch."""

    def __init__(self, data: ImageFiles, batch_size: int, num_workers: int, train: bool, seed: int = 0) -> None:
        super().__init__(data.targets, batch_size, train, seed)
        if num_workers < 0:
            raise UserError(f"the number of workers must be at least 0, it is {num_workers}")
        self._keys: list[tuple[int, Tensor]] = []
        self._loader: DataLoader[Any] = DataLoader(
            _Batches(data, train, seed),
            sampler=self._keys,
            batch_size=None,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # of its own, so that the global one is not touched
        )

    def iter_from(self, batch: int) -> Iterator[Batch]:
        """The epoch's batches from number `batch` (from 0, over all ranks) on."""
        order = self._order()
        self._keys[:] = [(self.epoch, order[share]) for share in self._shares(batch)]
        try:
            for fields in self._loader:
                yield tuple(field.to(self.device, non_blocking=True) for field in fields)
        except UserError as error:
            # A worker's error comes with its traceback around it; the message is the last line.
            raise UserError(str(error).strip().splitlines()[-1].split("UserError: ")[-1]) from None

    def _order(self) -> Tensor:
        count = len(self.targets)
        if not self.train:
            return torch.arange(count)
        return torch.randperm(count, generator=torch.Generator().manual_seed(mix_seed(self.seed, self.epoch)))
