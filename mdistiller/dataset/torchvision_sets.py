"""Data sets that torchvision downloads and lists, by name: DATASET.TYPE torchvision/CIFAR10.

torchvision fetches the files into DATASET.ROOT, compares their checksums and unpacks them. Encoded images are then read
by this package, as stored: every mode, safely, without their EXIF orientation, as torchvision's own loader does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from yacs.config import CfgNode as CN

from ..console import one_line, warn
from ..distributed.ranks import current_ranks
from ..errors import UserError
from ..registry import unknown_name
from ._base import DatasetInfo, configured_dict, missing, refuse_unused
from .archives import filtered
from .cifar100 import quiet_download
from .foreign import Chosen, ForeignData, Pictures, choose
from .image_file import decoded_bytes, read_pixels
from .views import OF_ANY_SIZE

PREFIX = "torchvision/"


@dataclass(frozen=True)
class Part:
    """A split: its number of images, as published, and the keyword arguments of torchvision's class that choose it."""

    images: int
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Published:
    """What is known about a data set before it is there.

    Attributes:
        classes: number of classes.
        parts: its splits, by the names that DATASET.TRAIN and VAL give them.
        read: torchvision's data set, name of the part -> names or array, labels and class names.
        val: the split that is validated on; empty: it has none.
        mirror: whether a mirrored image is one of the same class: no digit and no road sign is.
    """

    classes: int
    parts: Mapping[str, Part]
    read: Callable[[Any, str], Pictures]
    train: str = "train"
    val: str = "test"
    mirror: bool = True


def _by_flag(train: int, test: int, **options: Any) -> dict[str, Part]:
    return {"train": Part(train, {"train": True, **options}), "test": Part(test, {"train": False, **options})}


def _by_name(**images: int) -> dict[str, Part]:
    return {name: Part(count, {"split": name}) for name, count in images.items()}


def _all(images: int) -> dict[str, Part]:
    return {"all": Part(images, {})}


def _names(data: Any, labels: Sequence[int]) -> list[str]:
    """The class names that torchvision knows; else the labels themselves."""
    known = getattr(data, "classes", None) or getattr(data, "categories", None)
    if known:
        # Imagenette has several words for a class.
        return [str(name if isinstance(name, str) else name[0]) for name in known]
    return [str(label) for label in range(max(labels, default=-1) + 1)]


def _arrays(data: Any, part: str) -> Pictures:
    """Of a data set that torchvision holds in memory."""
    images = torch.as_tensor(data.data)
    if images.ndim == 3:  # grey
        images = images[..., None].expand(-1, -1, -1, 3)
    elif images.shape[1] == 3:
        images = images.permute(0, 2, 3, 1)
    labels = [int(label) for label in (data.targets if hasattr(data, "targets") else data.labels)]
    return Pictures.of_array(images.contiguous(), labels, _names(data, labels), part)


def _of_files(files: Sequence[tuple[Any, int]], data: Any) -> Pictures:
    paths, labels = [os.fspath(path) for path, _ in files], [int(label) for _, label in files]
    return Pictures(paths, labels, _names(data, labels), read_pixels, decoded_bytes)


# Where torchvision's classes keep (path, label), or paths and labels.
_PAIRS, _PATHS = ("samples", "_samples"), ("_image_files", "_images")


def _files(data: Any, part: str) -> Pictures:
    """Of a data set that torchvision keeps as a list of files."""
    for name in _PAIRS:
        if hasattr(data, name):
            return _of_files(getattr(data, name), data)
    paths = next(getattr(data, name) for name in _PATHS if hasattr(data, name))
    return _of_files(list(zip(paths, data._labels)), data)


def _sorted_files(data: Any, part: str) -> Pictures:
    """Of one whose list is in the disk's order, which is not the same everywhere."""
    return _of_files(sorted(zip(map(os.fspath, data._image_files), data._labels)), data)


def _caltech101(data: Any, part: str) -> Pictures:
    home = os.path.join(data.root, "101_ObjectCategories")
    return _of_files(
        [
            (os.path.join(home, data.categories[label], f"image_{number:04d}.jpg"), label)
            for number, label in zip(data.index, data.y)
        ],
        data,
    )


def _caltech256(data: Any, part: str) -> Pictures:
    home = os.path.join(data.root, "256_ObjectCategories")
    return _of_files(
        [
            (os.path.join(home, data.categories[label], f"{label + 1:03d}_{number:04d}.jpg"), label)
            for number, label in zip(data.index, data.y)
        ],
        data,
    )


# torchvision's class -> what is known. One that is not listed is no classification, or takes more than a download.
published: dict[str, Published] = {
    "CIFAR10": Published(10, _by_flag(50_000, 10_000), _arrays),
    "CIFAR100": Published(100, _by_flag(50_000, 10_000), _arrays),
    "Caltech101": Published(101, _all(8_677), _caltech101, "all", ""),
    "Caltech256": Published(257, _all(30_607), _caltech256, "all", ""),
    "Country211": Published(211, _by_name(train=31_650, valid=10_550, test=21_100), _files),
    "DTD": Published(47, _by_name(train=1_880, val=1_880, test=1_880), _files),
    "EMNIST": Published(47, _by_flag(112_800, 18_800, split="balanced"), _arrays, mirror=False),
    "EuroSAT": Published(10, _all(27_000), _files, "all", ""),
    "FGVCAircraft": Published(
        100, _by_name(train=3_334, val=3_333, trainval=6_667, test=3_333), _files, train="trainval"
    ),
    "FashionMNIST": Published(10, _by_flag(60_000, 10_000), _arrays),
    "Flowers102": Published(102, _by_name(train=1_020, val=1_020, test=6_149), _files),
    "Food101": Published(101, _by_name(train=75_750, test=25_250), _files),
    "GTSRB": Published(43, _by_name(train=26_640, test=12_630), _files, mirror=False),
    "Imagenette": Published(10, _by_name(train=9_469, val=3_925), _files, val="val"),
    "KMNIST": Published(10, _by_flag(60_000, 10_000), _arrays, mirror=False),
    "MNIST": Published(10, _by_flag(60_000, 10_000), _arrays, mirror=False),
    "OxfordIIITPet": Published(37, _by_name(trainval=3_680, test=3_669), _files, train="trainval"),
    "STL10": Published(10, _by_name(train=5_000, test=8_000), _arrays),
    "SUN397": Published(397, _all(108_754), _sorted_files, "all", ""),
    "SVHN": Published(10, _by_name(train=73_257, test=26_032, extra=531_131), _arrays, mirror=False),
    "StanfordCars": Published(196, _by_name(train=8_144, test=8_041), _files),
    "USPS": Published(10, _by_flag(7_291, 2_007), _arrays, mirror=False),
}


@configured_dict.register("torchvision")
def torchvision_set(cfg: CN) -> DatasetInfo:
    """The data set of torchvision's class that DATASET.TYPE names after `torchvision/`.

    Raises:
        UserError: no such data set; the message suggests similar names.
    """
    refuse_unused(cfg, "TRAIN", "VAL", *OF_ANY_SIZE)
    return TorchvisionData(cfg).info()


class TorchvisionData(ForeignData):
    """A data set of `published`."""

    def __init__(self, cfg: CN) -> None:
        super().__init__(cfg)
        self.name = self.type.removeprefix(PREFIX)
        if self.name not in published:
            raise unknown_name("data set of torchvision (DATASET.TYPE torchvision/NAME)", self.name, published)
        self.known = published[self.name]
        self.mirror = self.known.mirror

    def chosen(self, root: Path) -> Chosen:
        return choose(self.cfg, list(self.known.parts), self.known.train, self.known.val)

    def classes(self, root: Path) -> int:
        return self.known.classes

    def pictures(self, root: Path, parts: tuple[str, ...]) -> Pictures:
        """See `ForeignData.pictures`.

        Raises:
            UserError: it is not there and cannot be downloaded, or its files are damaged.
        """
        found = [self._part(root, part) for part in parts]
        return found[0] if len(found) == 1 else _joined(found)

    def _part(self, root: Path, part: str) -> Pictures:
        known = self.known.parts[part]
        pictures = self._read(root, part, known.options)
        count = len(pictures.names)
        if count != known.images and current_ranks().first:
            warn(f"{self.type} in {root}: {part} has {count} images, where the published data set has {known.images}")
        if max(pictures.labels, default=0) >= self.known.classes:
            raise UserError(f"{self.type} in {root} has labels up to {max(pictures.labels)}; fetch it again")
        names = [*pictures.class_names, *map(str, range(len(pictures.class_names), self.known.classes))]
        return replace(pictures, class_names=names)

    def _read(self, root: Path, part: str, options: Mapping[str, Any]) -> Pictures:
        kind = getattr(torchvision.datasets, self.name)
        try:
            try:
                data = kind(str(root), **options)
            except (RuntimeError, FileNotFoundError):  # not there, or its checksum is wrong
                self._download(kind, root, options)
                data = kind(str(root), **options)
            return self.known.read(data, part)
        except UserError:
            raise
        except Exception as error:  # on damaged files the readers raise nearly anything
            reason = f"{type(error).__name__}: {one_line(error, 200)}"
            raise UserError(
                f"{self.type} in {root} cannot be read ({reason}); remove its files there, so that they are fetched "
                "again, or copy intact ones there"
            ) from None

    def _download(self, kind: Any, root: Path, options: Mapping[str, Any]) -> None:
        try:
            with quiet_download(), filtered():
                kind(str(root), download=True, **options)
        except Exception as error:  # of the network, the disk, the archive, and of sets that are gone
            how = (
                f"it is missing or its checksum is wrong, and the download failed ({one_line(error, 200)}); copy the "
                "files there as torchvision lays them out"
            )
            raise missing(self.type, root, how) from error


def _joined(parts: Sequence[Pictures]) -> Pictures:
    """Several splits of one data set as one."""
    first = parts[0]
    labels = [label for part in parts for label in part.labels]
    if first.array is not None:
        arrays = [part.array for part in parts if part.array is not None]
        return Pictures.of_array(torch.cat(arrays), labels, first.class_names, first.names[0].partition("[")[0])
    names = [name for part in parts for name in part.names]
    return Pictures(names, labels, first.class_names, first.pixels, first.bytes_of)
