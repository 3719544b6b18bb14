"""The interfaces of all data sets: an entry of `dataset_dict` reads `Split`s, whose batches a `Loader` yields."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor
from yacs.config import CfgNode as CN

from ..errors import UserError
from ..models.native import NativeInput
from ..paths import expanded
from ..registry import Registry, unknown_name
from .batch import FIELDS
from .labels import check_labels, without_labels
from .workers import worker_counts

Batch = tuple[Tensor, ...]


class Read(Protocol):
    """Reads the training or the test split of a data set below `root`; `skip_broken` leaves out broken images."""

    def __call__(self, root: Path, train: bool, skip_broken: bool = False) -> Split: ...


@dataclass(frozen=True)
class DatasetInfo:
    """What other modules need to know about a data set, and how to read it.

    Attributes:
        num_classes: C; labels are 0..C-1.
        image_size: height and width of the images that a network sees, in pixels.
        model_family: which model dictionary serves it: "cifar", "tiny_imagenet" or "imagenet"; "any" for data of any
            size, where the image size chooses.
        read: (root, train, skip_broken) -> the training or the test split.
        mean, std: per channel, of values in [0, 1], by which its images are normalised; empty if not stated.
        at: the same images as networks with another native input see them; None where the images have one size.
        labelled: whether its images have labels; see `labels.NO_LABEL`.
        scored: (root, skip_broken) -> the images on which a network is scored outside of a run; None: the test split.
        check_validation: (root) -> None; refuses a data set without images to validate on, before any are read.
    """

    num_classes: int
    image_size: int
    model_family: str
    read: Read
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    at: Callable[[NativeInput], DatasetInfo] | None = None
    scored: Callable[[Path, bool], Split] | None = None
    labelled: bool = True
    check_validation: Callable[[Path], None] | None = None


# Data sets whose facts are fixed.
dataset_dict = Registry("data set")
# A data set whose facts its settings and files tell: configuration -> DatasetInfo. Its name is what stands before the
# first "/" of DATASET.TYPE.
Configured: TypeAlias = Callable[[CN], DatasetInfo]
configured_dict = Registry("data set")


def info_of(cfg: CN) -> DatasetInfo:
    """The data set of a configuration. A tree without the section DATASET means the default, CIFAR-100.

    Raises:
        UserError: no such data set, or its files do not tell its facts.
    """
    name = cfg.DATASET.TYPE if "DATASET" in cfg else "cifar100"
    kind = name.partition("/")[0]
    if kind in configured_dict:
        configured: Configured = configured_dict[kind]
        return configured(cfg)
    if name not in dataset_dict:
        raise unknown_name("data set", name, [*dataset_dict, *configured_dict])
    refuse_unused(cfg)
    info: DatasetInfo = dataset_dict[name]
    return info


# Settings that describe data; empty or 0 unless they are set.
_DESCRIBING = ("TRAIN", "VAL", "IMAGE_COLUMN", "LABEL_COLUMN", "NUM_CLASSES", "IMAGE_SIZE", "MEAN", "STD")


def refuse_unused(cfg: CN, *used: str) -> None:
    """Refuse a setting that describes data of another kind: the run would ignore it.

    Args:
        used: those of the settings TRAIN, VAL, IMAGE_COLUMN, ... of DATASET that this data set reads.

    Raises:
        UserError: names the setting and its value.
    """
    for key in _DESCRIBING if "DATASET" in cfg else ():
        value = cfg.DATASET.get(key)
        if value and key not in used:
            empty = "leave it out" if isinstance(value, (str, list)) else "set it to 0"
            raise UserError(f"DATASET.{key} {value} has no effect on DATASET.TYPE {cfg.DATASET.TYPE}; {empty}")


def register(
    name: str,
    num_classes: int,
    image_size: int,
    model_family: str,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> Callable[[Read], Read]:
    """Decorator: register a data set in `dataset_dict`; the decorated function is its `DatasetInfo.read`."""

    def enter(read: Read) -> Read:
        @wraps(read)
        def checked(root: Path, train: bool, skip_broken: bool = False) -> Split:
            split = read(root, train, skip_broken)
            check_labels(split.targets, f"the {'training' if train else 'test'} labels of {name}", num_classes)
            return split

        dataset_dict.register(name)(DatasetInfo(num_classes, image_size, model_family, checked, mean, std))
        return read

    return enter


class Split(Protocol):
    """One split of a data set, not yet batched: `in_memory.ImageArray` or `folders.ImageFiles`."""

    @property
    def targets(self) -> Tensor:
        """(N,) int64 labels."""

    def select(self, keep: Tensor) -> Split:
        """The images with the indices `keep` (K,) int64, in that order."""

    def augmented(self, name: str, size: int) -> Split:
        """The same images, augmented in training by DATASET.AUGMENT `name`, for networks that see `size` pixels."""

    def loader(self, batch_size: int, num_workers: int, train: bool, seed: int = 0) -> Loader:
        """Batches of this split; see `Loader`."""


class Loader(ABC):
    """Batches of a split, on `device`.

    A training loader shuffles, augments and yields (image, target, index). Other loaders go through the images in
    order, without randomness, and yield (image, target). The last batch may be short. In training it is left out where
    a rank's share of it would be a single image, unless that of a full batch is one too: a BatchNorm behind 1x1 maps
    cannot train on one image. The order changes with the epoch, and with it the images left out.

        image   (B, 3, H, W) float32, normalised
        target  (B,) int64
        index   (B,) int64, the image's index in `targets`

    All randomness comes from (seed, epoch, index): an epoch is the same on every device, with any number of
    workers, over any number of ranks, and from whichever batch it is resumed. The first pass is epoch 1, the next one
    epoch 2, and so on: `for batch in loader` sees new orders and augmentations. Once `set_epoch` has been called, every
    pass is that epoch until the next call.

    `batch.host_index(index)` tells a training batch's indices, and the next batch's, without waiting for the device.

    Attributes:
        targets: (N,) int64 labels of all images, on the CPU.
        labelled: whether the images have labels; else each target is `labels.NO_LABEL`.
        class_names: the name of every class, by label; empty if they are unknown.
        mean, std: per channel, of values in [0, 1], by which the images are normalised; empty if unknown.
        image_size: height and width of the images, in pixels; 0 if it is unknown, or if the two differ.
        batch_size: B, over all ranks together in training.
        epoch: of the last pass that began, from 1, or what `set_epoch` has chosen.
        rank, world: this process's rank and the number of processes that share the images; see `shard`.
        augmentation: the DATASET.AUGMENT that its images have; empty: the data set's own.
        variants: how many different images augmentation can make of one image, if they are few; else None.
    """

    augmentation: str = ""
    variants: int | None = None
    image_size: int = 0

    def __init__(
        self,
        targets: Tensor,
        batch_size: int,
        train: bool,
        seed: int,
        class_names: Sequence[str] = (),
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
    ) -> None:
        if batch_size < 1:
            raise UserError(f"the batch size must be at least 1, it is {batch_size}")
        self.labelled = not without_labels(targets)
        if self.labelled:
            check_labels(targets, f"the targets of {type(self).__name__}")
        self.targets = targets
        self.class_names = tuple(class_names)
        if self.class_names and len(targets) and int(targets.max()) >= len(self.class_names):
            raise UserError(f"label {int(targets.max())} has no name: there are {len(self.class_names)} class_names")
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self.batch_size = batch_size
        self.train = train
        self.seed = seed
        self.epoch = 1
        self._next_epoch: int | None = 1  # None: `set_epoch` decides
        self.device = torch.device("cpu")
        self.rank, self.world = 0, 1
        self._check_count()

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The names of a batch's items, in order. A subclass or a caller may set others."""
        return FIELDS if self.train else FIELDS[:2]

    def __len__(self) -> int:
        """Batches of this rank in an epoch; in training every rank has the same number."""
        return len(self._shares(0))

    def __iter__(self) -> Iterator[Batch]:
        return self.iter_from(0)

    def iter_from(self, batch: int) -> Iterator[Batch]:
        """Begin a pass at batch number `batch` (from 0, over all ranks): the rest of an interrupted epoch.

        The epoch is settled here, not at the first batch.
        """
        if self.train and self._next_epoch is not None:
            self.epoch = self._next_epoch
            self._next_epoch += 1
        return self._batches(self._shares(batch))

    @abstractmethod
    def _batches(self, shares: list[slice]) -> Iterator[Batch]:
        """The batches of `self.epoch` as it is at the call; each share is a slice of the epoch's order."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of the passes from now on."""
        self.epoch, self._next_epoch = epoch, None

    def to(self, device: torch.device | str) -> Loader:
        """Yield the batches on `device` from now on; returns self."""
        self.device = torch.device(device)
        return self

    def shard(self, rank: int, world: int) -> Loader:
        """Yield only the share of process `rank` (from 0) of `world` from now on; returns self.

        In training, every batch that one process would yield is cut into `world` slices of equal size, of which rank
        r yields slice r; what remains of the short last batch is dropped (all of it where a slice would be a single
        image). In validation, rank r yields the whole batches r, r + world, ...: every image comes once, and some ranks
        may have one batch less, or none.

        Raises:
            UserError: the batch size is not a multiple of `world`, or the training images are too few.
        """
        assert 0 <= rank < world, (rank, world)
        if self.train and self.batch_size % world:
            raise UserError(
                f"SOLVER.BATCH_SIZE {self.batch_size} is not a multiple of {world} processes; it counts the images of "
                f"all processes: set it to {max(1, round(self.batch_size / world)) * world}"
            )
        if self.train and len(self.targets) < world:
            raise UserError(f"{len(self.targets)} training images are too few for {world} processes; start fewer")
        self.rank, self.world = rank, world
        self._check_count()
        return self

    def _check_count(self) -> None:
        """Refuse a training set of which no batch is left."""
        if self.train and not self._shares(0):
            raise UserError(
                f"the training set has {len(self.targets)} image(s), too few for a step on {2 * self.world} (two a "
                f"process); take more images, start fewer processes, or set SOLVER.BATCH_SIZE {self.world}"
            )

    def _shares(self, batch: int) -> list[slice]:
        """The slice of the epoch's order for each batch of this rank, from number `batch` over all ranks on."""
        count, size = len(self.targets), self.batch_size
        if not self.train:
            starts = range(0, count, size)[batch:]
            return [slice(s, s + size) for s in starts if s // size % self.world == self.rank]
        whole = [(s, min(size, count - s) // self.world) for s in range(0, count, size)[batch:]]
        smallest = min(2, size // self.world)
        return [slice(s + self.rank * share, s + (self.rank + 1) * share) for s, share in whole if share >= smallest]


def mix_seed(*key: int) -> int:
    """One 64-bit seed from several numbers >= 0; neighbouring keys give unrelated streams."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def stratified_split(targets: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Indices of a fixed `fraction` of every class, and indices of the rest; both ascending.

    Chosen at random with a fixed seed, so that every run has the same; a smaller fraction is a subset of a larger one.
    The number of images is rounded separately for each class and is at least one.
    """
    # RandomState, because its stream is the same in every NumPy release.
    shuffled = torch.from_numpy(np.random.RandomState(0).permutation(len(targets)))
    labels = targets.clamp(min=0)  # images without labels are of one class
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    chosen = torch.zeros(len(targets), dtype=torch.bool)
    for members in by_class.split(labels.bincount().tolist()):
        chosen[members[: max(1, round(fraction * len(members)))]] = True
    return chosen.nonzero()[:, 0], chosen.logical_not().nonzero()[:, 0]


def check_class_names(train: Any, val: Any) -> None:
    """Refuse a training and a validation loader that name their classes differently; names may be unknown.

    Raises:
        UserError: a label means one class in training and another one in validation.
    """
    ours, theirs = (tuple(getattr(loader, "class_names", ())) for loader in (train, val))
    if not ours or not theirs or ours == theirs:
        return
    differ = [f"{label} is {a!r} and {b!r}" for label, (a, b) in enumerate(zip(ours, theirs)) if a != b]
    some = f": label {', '.join(differ[:3])}{', ...' if len(differ) > 3 else ''}" if differ else ""
    raise UserError(
        f"training and validation name {len(ours)} and {len(theirs)} classes, {len(differ)} labels differently{some}; "
        "give both the same class_names, from one list"
    )


def missing(what: str, folder: Path | str, how: str) -> UserError:
    """The error for data that is not in its `folder`, with `how` to put it there."""
    hint = "DATASET.TYPE digits (configs/digits) runs without any download"
    link = f", a link to {os.readlink(folder)}, which is not there" if os.path.islink(folder) else ""
    return UserError(f"{what} is expected in {folder}{link}: {how}; {hint}")


def get_dataloaders(
    name: str,
    batch_size: int,
    val_batch_size: int,
    num_workers: int,
    root: str = "./data",
    seed: int = 0,
    train_fraction: float = 1.0,
    val_fraction: float = 0.0,
    skip_broken: bool = False,
    augment: str = "",
    info: DatasetInfo | None = None,
) -> tuple[Loader, Loader, int]:
    """Training loader, validation loader and number of training images of data set `name`.

    Args:
        num_workers: processes that read training images, for all ranks on this machine; `workers.worker_counts` gives
            each loader its number. 0 reads them in this process. Data sets held in memory ignore it.
        root: the folder of the data sets' folders.
        seed: of the order and the augmentation, >= 0.
        train_fraction: train on this fixed fraction of every class, in (0, 1].
        val_fraction: when > 0, this fixed fraction of every class of the training set, in [0, 1), is held out first
            and used for validation instead of the test set.
        skip_broken: skip images that cannot be read, and warn with their number.
        augment: how the training images are augmented, see `augmentation`; empty: as the data set says.
        info: the facts of a data set whose settings tell them (`info_of`), which messages then call `name`.

    Raises:
        UserError: no such data set, data missing or unreadable, nothing to hold out, or two lists of classes.
    """
    folder = Path(expanded(root))
    if info is None:
        info = dataset_dict[name]
    if not val_fraction and info.check_validation is not None:
        info.check_validation(folder)
    train = info.read(folder, True, skip_broken)
    if val_fraction > 0:
        kept, held_out = stratified_split(train.targets, 1 - val_fraction)
        if len(held_out) == 0:
            raise UserError(f"DATASET.VAL_FRACTION {val_fraction} holds out no image of {name}; set a larger one")
        train, val = train.select(kept), train.select(held_out)
    else:
        val = info.read(folder, False, skip_broken)
    if train_fraction < 1:
        train = train.select(stratified_split(train.targets, train_fraction)[0])
    if augment:
        train = train.augmented(augment, info.image_size)
    train_workers, val_workers = worker_counts(num_workers)
    train_loader = train.loader(batch_size, train_workers, train=True, seed=seed)
    train_loader.augmentation = augment
    val_loader = val.loader(val_batch_size, val_workers, train=False)
    for loader in (train_loader, val_loader):
        loader.image_size = loader.image_size or info.image_size
    check_class_names(train_loader, val_loader)
    return train_loader, val_loader, len(train.targets)
