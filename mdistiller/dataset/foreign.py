"""Data sets that other libraries read: which of their splits are used, and how their images become splits of ours."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from yacs.config import CfgNode as CN

from ..console import note
from ..distributed.ranks import current_ranks
from ..errors import UserError
from ..models.native import NativeInput
from ..paths import expanded
from ..registry import unknown_name
from ._base import DatasetInfo, Split, stratified_split
from .augment import CropFlip
from .augmentation import padding_of
from .in_memory import ImageArray
from .own_images import split_of
from .views import Pixels, input_of, seen_at


@dataclass(frozen=True)
class Pictures:
    """Labelled images of any size.

    Attributes:
        names: N names, all different, by which messages name the images: paths, or `train[3]`.
        labels: N labels, 0..C-1.
        class_names: the C names, by label.
        pixels: name -> (H, W, 3) uint8. It raises a BrokenImageError for an image that cannot be read.
        bytes_of: name -> the size of its pixels in memory, in bytes; raises as `pixels`.
        array: (N, H, W, 3) uint8, of images of one size that are in memory; else None.
    """

    names: Sequence[str]
    labels: Sequence[int]
    class_names: Sequence[str]
    pixels: Pixels
    bytes_of: Callable[[str], int]
    array: Tensor | None = None

    @classmethod
    def of_array(cls, array: Tensor, labels: Sequence[int], class_names: Sequence[str], part: str) -> Pictures:
        """Images (N, H, W, 3) uint8 of the split `part`."""
        names = [f"{part}[{row}]" for row in range(len(array))]
        every = array[0].numel() if len(array) else 0
        return cls(names, labels, class_names, Rows(array), lambda name: every, array)


@dataclass(frozen=True)
class Rows:
    """The pixels of an image in `array` (N, H, W, 3) by its name, `train[3]`."""

    array: Tensor

    def __call__(self, name: str) -> Tensor:
        return self.array[row_of(name)]


def row_of(name: str) -> int:
    """3 of `train[3]`."""
    return int(name[name.rindex("[") + 1 : -1])


@dataclass(frozen=True)
class Chosen:
    """The names of the splits that are trained and validated on; no `val`: there is none."""

    train: tuple[str, ...]
    val: tuple[str, ...]


def choose(cfg: CN, known: Sequence[str], train: str, val: str) -> Chosen:
    """The splits that DATASET.TRAIN and VAL name, joined by "+"; else the usual ones, `train` and `val` ("": none).

    Raises:
        UserError: no such split, or one stands in both.
    """
    parts = {}
    for key, usual in (("TRAIN", train), ("VAL", val)):
        text = cfg.DATASET[key]
        parts[key] = tuple(filter(None, (name.strip() for name in (text or usual).split("+"))))
        for name in parts[key]:
            if name not in known:
                raise unknown_name(f"split (DATASET.{key}) of {cfg.DATASET.TYPE}", name, known)
    both = [name for name in parts["TRAIN"] if name in parts["VAL"]]
    if both and cfg.DATASET.VAL:
        raise UserError(f"split {both[0]} is in DATASET.TRAIN and in DATASET.VAL; name others, or leave out one")
    return Chosen(parts["TRAIN"], () if both else parts["VAL"])


class ForeignData(ABC):
    """A data set of a configuration that another library reads.

    Attributes:
        mirror: whether its images may be mirrored.
    """

    mirror = True

    def __init__(self, cfg: CN) -> None:
        self.cfg = cfg
        self.type: str = cfg.DATASET.TYPE

    @abstractmethod
    def chosen(self, root: Path) -> Chosen:
        """The splits to use."""

    @abstractmethod
    def classes(self, root: Path) -> int:
        """The number of classes."""

    @abstractmethod
    def pictures(self, root: Path, parts: tuple[str, ...]) -> Pictures:
        """The images of the splits `parts`, one after another."""

    def info(self) -> DatasetInfo:
        """Its facts. The files are read only where DATASET.NUM_CLASSES is 0 and nothing else tells them."""
        native = input_of(self.cfg)
        count = self.cfg.DATASET.NUM_CLASSES or self.classes(Path(expanded(self.cfg.DATASET.ROOT)))
        return DatasetInfo(
            count, native.size, "any", self.read, tuple(native.mean), tuple(native.std), at=self._at,
            scored=self._scored, check_validation=self._check_validation,
        )  # fmt: skip

    def read(self, root: Path, train: bool, skip_broken: bool = False) -> Split:
        """The training or the validation images; see `DatasetInfo.read`.

        Raises:
            UserError: there is no such split, it cannot be read, or it has another number of classes than
                DATASET.NUM_CLASSES.
        """
        if not train:
            self._check_validation(root)
        chosen = self.chosen(root)
        return self._split(self._checked(root, chosen.train if train else chosen.val), skip_broken, say=train)

    def _check_validation(self, root: Path) -> None:
        """Refuse a data set without a split to validate on."""
        chosen = self.chosen(root)
        if not chosen.val:
            raise UserError(
                f"{self.type} has no split to validate on besides {'+'.join(chosen.train)}; set DATASET.VAL_FRACTION, "
                "such as 0.1, to hold out a part of the training images"
            )

    def _scored(self, root: Path, skip_broken: bool = False) -> Split:
        """The images on which a trained network is scored: of the validation split, or what a run held out of it."""
        chosen, fraction = self.chosen(root), self.cfg.DATASET.VAL_FRACTION
        split = self._split(self._checked(root, chosen.val or chosen.train), skip_broken, hold=False)
        if chosen.val or not fraction:
            return split
        return split.select(stratified_split(split.targets, 1 - fraction)[1])

    def _at(self, native: NativeInput) -> DatasetInfo:
        """The same images as networks with the input `native` see them."""
        return type(self)(seen_at(self.cfg, native)).info()

    def _checked(self, root: Path, parts: tuple[str, ...]) -> Pictures:
        pictures, expected = self.pictures(root, parts), self.cfg.DATASET.NUM_CLASSES
        if not len(pictures.names):
            raise UserError(f"{self.type}: split {'+'.join(parts)} has no image; name another one")
        found = len(pictures.class_names)
        if expected and found != expected:
            raise UserError(
                f"{self.type} has {found} classes, but DATASET.NUM_CLASSES is {expected}; set it to 0 or to {found}"
            )
        return pictures

    def _split(self, pictures: Pictures, skip_broken: bool, say: bool = False, hold: bool = True) -> Split:
        """The images as the student sees them: in memory as it sees them, or in memory as they are, or by workers."""
        native, names, array = input_of(self.cfg), pictures.names, pictures.array
        if array is not None and array.shape[1:3] == (native.size, native.size):
            augment, labels = CropFlip(padding_of(native.size), flip=self.mirror), torch.tensor(pictures.labels)
            return ImageArray(array, labels, native.mean, native.std, augment, pictures.class_names)
        if array is not None and say and current_ranks().first:
            sizes = f"{array.shape[2]}x{array.shape[1]} pixels are resized to {native.size}x{native.size}"
            note(f"{self.type}: its images of {sizes} (DATASET.IMAGE_SIZE; 0: the student's own)")
        return split_of(
            list(zip(names, pictures.labels)), self.cfg, skip_broken, not hold or array is not None,
            pictures.class_names, pictures.pixels, pictures.bytes_of, self.mirror,
        )  # fmt: skip
