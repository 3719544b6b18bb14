"""Class folders of a user's own: any classes, any images, seen as the student was made to see them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from yacs.config import CfgNode as CN

from ..console import note
from ..distributed.ranks import current_ranks
from ..errors import UserError
from ..models.native import NativeInput
from ..paths import expanded
from ._base import DatasetInfo, Split, configured_dict, missing, refuse_unused, stratified_split
from .listing import class_list, files_of_folder, folders_in
from .own_images import split_of
from .views import OF_ANY_SIZE, input_of, seen_at

NO_VALIDATION = "set DATASET.VAL_FRACTION, such as 0.1, to hold out training images, or DATASET.VAL to a folder"


@configured_dict.register("folder")
def folder(cfg: CN) -> DatasetInfo:
    """DATASET.ROOT/train/<class> and /val/<class>, or <class> alone, or as DATASET.TRAIN and VAL say.

    The number of classes is DATASET.NUM_CLASSES, or else counted in the folders.
    """
    refuse_unused(cfg, "TRAIN", "VAL", *OF_ANY_SIZE)
    data, native = ClassFolders(cfg), input_of(cfg)
    count = cfg.DATASET.NUM_CLASSES or len(data.classes(Parts.of(Path(expanded(cfg.DATASET.ROOT)), cfg)))
    return DatasetInfo(
        count, native.size, "any", data.read, tuple(native.mean), tuple(native.std), data.seen_at, data.scored
    )


@dataclass(frozen=True)
class Parts:
    """Where the images of each part lie.

    Attributes:
        root: DATASET.ROOT.
        train: the folder of the training images' class folders; None if there is none.
        val: likewise of the validation images.
    """

    root: Path
    train: Path | None
    val: Path | None

    @classmethod
    def of(cls, root: Path, cfg: CN) -> Parts:
        """The parts of `root`.

        Raises:
            UserError: `root` is no folder, or training and validation images are the same.
        """
        if not os.path.isdir(root):
            raise missing("a data set of class folders", root, "set DATASET.ROOT to the folder of your images")
        named = {part: root / text if text else None for part, text in _named(cfg).items()}
        usual = (root / name for name in ("val", "test") if _holds_folders(root / name))
        val = named["VAL"] or next((part for part in usual if not _same(part, named["TRAIN"])), None)
        train = named["TRAIN"] or (root / "train" if _holds_folders(root / "train") else None)
        if train is None and (val is None or named["VAL"]):
            train = root
        for part, where in named.items():
            if where is not None and not os.path.isdir(where):
                raise UserError(f"DATASET.{part} {_named(cfg)[part]} is no folder: there is no {where}; correct it")
        if val is not None and _same(val, train):
            raise UserError(f"DATASET.TRAIN and DATASET.VAL are both {train}; {NO_VALIDATION} of other images")
        return cls(root, train, val)

    @property
    def alone(self) -> bool:
        """Whether the class folders lie in the root itself, and nothing else."""
        return self.val is None and self.train == self.root

    def there(self) -> list[Path]:
        """The parts that there are, that of training first."""
        return [part for part in (self.train, self.val) if part is not None]

    def besides(self) -> set[str]:
        """Folders in the root that are no classes, because parts lie in them; of use where classes lie there, too."""
        inner = [part for part in self.there() if self.root in part.parents]
        return {part.relative_to(self.root).parts[0] for part in inner} if self.train == self.root else set()


def _same(one: Path, other: Path | None) -> bool:
    return other is not None and os.path.realpath(one) == os.path.realpath(other)


def _named(cfg: CN) -> dict[str, str]:
    return {"TRAIN": cfg.DATASET.TRAIN, "VAL": cfg.DATASET.VAL}


def _holds_folders(folder: Path) -> bool:
    """Whether `folder` holds class folders. One with images alone is a class: "train", beside "bus" and "car"."""
    return os.path.isdir(folder) and bool(folders_in(folder))


def in_label_order(names: Sequence[str]) -> list[str]:
    """Names of class folders in the order of their labels: as text, but by value if all are whole numbers."""
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


class ClassFolders:
    """The class folders of a configuration."""

    def __init__(self, cfg: CN) -> None:
        self.cfg = cfg

    def classes(self, parts: Parts) -> list[str]:
        """The names of the classes, by label.

        Raises:
            UserError: there are none, the parts have different ones, or another number than DATASET.NUM_CLASSES.
        """
        names = in_label_order(class_list(parts.there(), 0, besides=parts.besides()))
        expected = self.cfg.DATASET.NUM_CLASSES
        if expected and len(names) != expected:
            raise UserError(
                f"{parts.there()[0]} has {len(names)} class folders, but DATASET.NUM_CLASSES is {expected}; put the "
                "others there, or set it to 0 (empty folders count too)"
            )
        return names

    def read(self, root: Path, train: bool, skip_broken: bool = False) -> Split:
        """The training or the validation images; see `DatasetInfo.read`.

        Raises:
            UserError: that part is missing, see also `classes` and `listing.files_of_folder`.
        """
        parts = Parts.of(root, self.cfg)
        part, other = (parts.train, parts.val) if train else (parts.val, parts.train)
        if part is None and train:
            raise UserError(f"{root}/train has no class folders to train on; put them there, or set DATASET.TRAIN")
        if part is None:
            raise UserError(f"there are no validation images, {root}/val or {root}/test: {NO_VALIDATION}")
        classes = self.classes(parts)
        if train:
            _say_order(parts, classes)
        # A held-out part of the training images takes the place of the other folder.
        compared = None if self.cfg.DATASET.VAL_FRACTION else other
        return split_of(files_of_folder(part, classes, compared), self.cfg, skip_broken, class_names=classes)

    def scored(self, root: Path, skip_broken: bool = False) -> Split:
        """The images on which a trained network is scored: the validation images, or if there are no parts, all.

        Of a run that held out a part, that part.
        """
        parts, fraction = Parts.of(root, self.cfg), self.cfg.DATASET.VAL_FRACTION
        part = parts.val or (parts.train if parts.alone or fraction else None)
        if part is None:
            raise UserError(f"{root} has no val and no test to score on; --data-root {root}/train scores on that")
        classes = self.classes(parts)
        split = split_of(files_of_folder(part, classes), self.cfg, skip_broken, once=True, class_names=classes)
        held_out = parts.val is None and fraction > 0
        return split.select(stratified_split(split.targets, 1 - fraction)[1]) if held_out else split

    def seen_at(self, native: NativeInput) -> DatasetInfo:
        """The same images as networks with the input `native` see them."""
        return folder(seen_at(self.cfg, native))


def _say_order(parts: Parts, classes: Sequence[str]) -> None:
    """Say which label each class has, as far as a line goes."""
    if not current_ranks().first:
        return
    few = ", ".join(f"{label} {name}" for label, name in enumerate(classes[:4]))
    last = f", ..., {len(classes) - 1} {classes[-1]}" if len(classes) > 4 else ""
    numbers = classes != sorted(classes)
    how = " (by value; torchvision's ImageFolder sorts them as text)" if numbers else ""
    note(f"{parts.train}: {len(classes)} classes, by label: {few}{last}{how}")
