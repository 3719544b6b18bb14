"""Hugging Face data sets: DATASET.TYPE hf (what lies in DATASET.ROOT) and hf/NAME (of the hub, or imagefolder).

The library `datasets` (extra `hf`) finds the splits and the columns' types; it is imported only when it is named.
Encoded images are decoded by this package: every mode, safely, turned as their EXIF block says.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from yacs.config import CfgNode as CN

from ..console import one_line
from ..errors import UserError
from ..registry import unknown_name
from ._base import DatasetInfo, configured_dict, missing, refuse_unused
from .foreign import Chosen, ForeignData, Pictures, choose, row_of
from .image_file import BrokenImageError, decoded_bytes, read_pixels
from .pixels import check_pixels
from .views import OF_ANY_SIZE

INSTALL = "DATASET.TYPE {type} needs the library datasets: pip install -e .[hf] (or pip install datasets)"
# Builders of `datasets` that read what lies in DATASET.ROOT.
BUILDERS = ("imagefolder", "parquet", "arrow")
SUFFIXES = {".parquet": "parquet", ".arrow": "arrow"}
# The usual names of splits, the first that there is.
TRAIN, VAL = ("train", "training"), ("validation", "valid", "val", "dev", "test", "testing")
# Names of columns whose type does not tell what they hold.
IMAGES, LABELS = ("image", "img", "images", "picture", "photo", "png", "jpg", "jpeg", "webp"), (
    "label", "labels", "target", "class", "cls", "category", "fine_label", "coarse_label",
)  # fmt: skip


@configured_dict.register("hf")
def hugging_face(cfg: CN) -> DatasetInfo:
    """The data set of DATASET.TYPE hf or hf/NAME.

    The number of classes is DATASET.NUM_CLASSES, or else what the data tells.
    """
    refuse_unused(cfg, "TRAIN", "VAL", "IMAGE_COLUMN", "LABEL_COLUMN", *OF_ANY_SIZE)
    return HuggingFaceData(cfg).info()


class HuggingFaceData(ForeignData):
    """A data set that `datasets` loads."""

    def __init__(self, cfg: CN) -> None:
        super().__init__(cfg)
        self.name = self.type.partition("/")[2]
        self._known: dict[Path, dict[str, Any]] = {}

    @cached_property
    def library(self) -> Any:
        """The library `datasets`."""
        try:
            import datasets
        except ImportError:
            raise UserError(INSTALL.format(type=self.type)) from None
        return datasets

    def _splits(self, root: Path) -> Mapping[str, Any]:
        """The data set's splits by name; loaded once, from `root` or the hub."""
        if root not in self._known:
            with self._quiet(root):
                loaded = self._loaded(root)
            single = isinstance(loaded, self.library.Dataset)
            splits = {loaded.split or "train": loaded} if single else loaded
            self._known[root] = {str(name): split.with_format(None) for name, split in splits.items()}
        return self._known[root]

    def _loaded(self, root: Path) -> Any:
        if self.name in BUILDERS:
            self._check_there(root)
            return self.library.load_dataset(self.name, data_dir=str(root))
        if self.name:
            repository, _, configuration = self.name.partition(":")
            return self.library.load_dataset(repository, configuration or None)
        self._check_there(root)
        if any((root / file).is_file() for file in ("dataset_dict.json", "state.json")):
            return self.library.load_from_disk(str(root))
        if not root.is_file():
            return self.library.load_dataset(str(root))
        if root.suffix not in SUFFIXES:
            raise UserError(f"{root} is no {' or '.join(SUFFIXES)} file; set DATASET.ROOT to one, or to a folder")
        return self.library.load_dataset(SUFFIXES[root.suffix], data_files={"train": str(root)})

    def _check_there(self, root: Path) -> None:
        if not os.path.exists(root):
            how = "set DATASET.ROOT to what save_to_disk wrote, or to Parquet or Arrow files"
            raise missing("a data set", root, how)

    @contextmanager
    def _quiet(self, root: Path) -> Iterator[None]:
        """`datasets` without its progress bars, and with each of its errors as one line."""
        shown = not self.library.are_progress_bars_disabled()
        self.library.disable_progress_bars()
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # of the network, the disk, damaged files, missing scripts and configurations
            what = self.name if self.name and self.name not in BUILDERS else root
            raise UserError(
                f"{self.type}: datasets cannot load {what} ({type(error).__name__}: {one_line(error, 300)}); correct "
                "the name or the files, or save it where there is a network by save_to_disk, and set DATASET.TYPE hf "
                "and DATASET.ROOT to that folder"
            ) from None
        finally:
            if shown:
                self.library.enable_progress_bars()

    def chosen(self, root: Path) -> Chosen:
        """The splits that DATASET.TRAIN and VAL name; else those with the usual names, or the only one."""
        known = list(self._splits(root))
        train = next((name for name in TRAIN if name in known), known[0] if len(known) == 1 else "")
        if not train and not self.cfg.DATASET.TRAIN:
            raise UserError(f"{self.type} has no split train, but {', '.join(known)}; name one by DATASET.TRAIN")
        return choose(self.cfg, known, train, next((name for name in VAL if name in known), ""))

    def classes(self, root: Path) -> int:
        return len(self._labels_of(root, self.chosen(root).train)[1])

    def pictures(self, root: Path, parts: tuple[str, ...]) -> Pictures:
        """See `ForeignData.pictures`.

        Raises:
            UserError: no column of images or labels, or several; a row without a label, or with one of no class.
        """
        labels, class_names = self._labels_of(root, parts)
        splits = [self._splits(root)[part] for part in parts]
        column = self._column(splits[0], "IMAGE_COLUMN", IMAGES, "Image")
        with self._quiet(root):
            rows = self.library.concatenate_datasets([split.select_columns([column]) for split in splits])
            if isinstance(rows.features[column], self.library.Image):
                rows = rows.cast_column(column, self.library.Image(decode=False))
        local = not self.name or self.name in BUILDERS
        names = [f"{root if local else self.name} {'+'.join(parts)}[{row}]" for row in range(len(rows))]
        images = RowImages(rows, column, str(root if root.is_dir() else root.parent))
        return Pictures(names, labels, class_names, images, images.bytes_of)

    def _labels_of(self, root: Path, parts: tuple[str, ...]) -> tuple[list[int], list[str]]:
        """The labels of the splits `parts`, and the names of all classes.

        Of a column without class names, the classes are the values of the training split but for -1, sorted.
        """
        trained = self.chosen(root).train
        column = self._column(self._splits(root)[trained[0]], "LABEL_COLUMN", LABELS, "ClassLabel")
        feature = self._splits(root)[trained[0]].features[column]
        values = self._values(root, parts, column, feature)
        if isinstance(feature, self.library.ClassLabel):
            names, known = list(feature.names), dict(zip(range(len(feature.names)), range(len(feature.names))))
        else:
            # -1 stands for "no label", as it does in a column with class names.
            order = sorted(set(self._values(root, trained, column, feature)) - {-1})
            names, known = list(map(str, order)), {value: label for label, value in enumerate(order)}
        for row, value in enumerate(values):
            if value not in known:
                hint = "its images have no labels" if value == -1 else "the classes are those of the training split"
                raise UserError(
                    f"{self.type}: split {'+'.join(parts)} has the label {value!r} in row {row}, which is no class: "
                    f"{hint}; name another split by DATASET.TRAIN or VAL"
                )
        return [known[value] for value in values], names

    def _values(self, root: Path, parts: tuple[str, ...], column: str, feature: Any) -> list[Any]:
        """The labels of the splits `parts` as they are stored: all texts or all whole numbers."""
        values: list[Any] = []
        for part in parts:
            split = self._splits(root)[part]
            own = split.features.get(column)
            if own != feature:
                differ = f"{_kind(feature)} in the training split and {_kind(own)} in {part}"
                raise UserError(
                    f"{self.type}: column {column} is {differ}; cast them to one type, or name other splits by "
                    "DATASET.TRAIN and VAL"
                )
            values += list(split[column])
        kind = str if values and isinstance(values[0], str) else int
        for row, value in enumerate(values):
            if not isinstance(value, kind):
                where = f"{self.type}: split {'+'.join(parts)}"
                raise UserError(
                    f"{where} has the label {value!r} in row {row} of {column}, which is no text or whole number; "
                    "name another column by DATASET.LABEL_COLUMN, or leave out such rows"
                )
        return values

    def _column(self, split: Any, key: str, usual: Sequence[str], kind: str) -> str:
        """The column that DATASET.`key` names; else the one of the type `kind` of `datasets`, else of a usual name."""
        named = self.cfg.DATASET[key]
        if named:
            if named not in split.features:
                raise unknown_name(f"column (DATASET.{key}) of {self.type}", named, list(split.features))
            return str(named)
        typed = [name for name, of in split.features.items() if isinstance(of, getattr(self.library, kind))]
        found = typed or [name for name in usual if name in split.features]
        if len(found) == 1:
            return found[0]
        what = "images" if key == "IMAGE_COLUMN" else "labels"
        if found:
            raise UserError(f"{self.type} has several columns of {what}: {', '.join(found)}; name one by DATASET.{key}")
        every = ", ".join(f"{name} ({_kind(of)})" for name, of in split.features.items())
        raise UserError(f"{self.type} has no column known to hold {what}, but {every}; name it by DATASET.{key}")


def _kind(feature: Any) -> str:
    """The type of a column in words: `int64`, or `ClassLabel of cat, dog`; what is not there is `missing`."""
    names = getattr(feature, "names", None)
    if names:
        return f"ClassLabel of {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
    kind = type(feature).__name__
    return "missing" if feature is None else str(feature.dtype) if kind == "Value" else kind


@dataclass(frozen=True)
class RowImages:
    """The pixels (H, W, 3) uint8 of an image by its name: of encoded bytes, a file, or an array of pixels.

    Attributes:
        rows: a data set of `datasets`, undecoded.
        column: that of the images.
        folder: where relative paths begin.
    """

    rows: Any
    column: str
    folder: str

    def __call__(self, name: str) -> Tensor:
        held = self._held(name)
        path, content = self._encoded(held, name)
        return _of_array(held, name) if path is None else read_pixels(path, upright=True, content=content)

    def bytes_of(self, name: str) -> int:
        """The size of an image's pixels in memory, in bytes."""
        held = self._held(name)
        path, content = self._encoded(held, name)
        return 3 * np.asarray(held).size if path is None else decoded_bytes(path, content)

    def _held(self, name: str) -> Any:
        held = self.rows[row_of(name)][self.column]
        if held is None:
            raise BrokenImageError(f"{name} has no image; leave the row out")
        return held

    def _encoded(self, held: Any, name: str) -> tuple[str | None, bytes | None]:
        """The name or path of an encoded image, and its bytes; no path: `held` is no encoded image."""
        content = held.get("bytes") if isinstance(held, Mapping) else held
        path = held.get("path") if isinstance(held, Mapping) else held
        if isinstance(content, (bytes, bytearray)):
            return name, bytes(content)
        return (os.path.join(self.folder, path), None) if isinstance(path, str) else (None, None)


def _of_array(held: Any, name: str) -> Tensor:
    """(H, W, 3) uint8 of numbers: (H, W), (H, W, 1) or (H, W, 3), whole, 0 to 255."""
    try:
        values = np.asarray(held)
        whole = values.dtype.kind in "iu" and values.size and 0 <= values.min() <= values.max() <= 255
        pixels = torch.as_tensor(values.astype(np.uint8) if whole else values)
    except (ValueError, TypeError, RuntimeError) as error:
        raise BrokenImageError(f"{name} is neither an image nor an array of pixels ({one_line(error)})") from None
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels.expand(-1, -1, 3)
    check_pixels(pixels, "(H, W, 3)", name)
    return pixels.contiguous()
