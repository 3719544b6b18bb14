"""Annotation files in COCO's format: checked before anything is built, and their classes made those of the run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from mdistiller.engine.overrides import setting, shown
from mdistiller.errors import UserError
from mdistiller.paths import expanded
from mdistiller.ranges import TEXT, list_of
from mdistiller.user_files import read_text

from .. import HERE

# detectron2's default of every NUM_CLASSES, which is COCO's number. It counts as not set.
COCO_CLASSES = 80
NUM_CLASSES = (
    "MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.RETINANET.NUM_CLASSES", "TEACHER.MODEL.ROI_HEADS.NUM_CLASSES",
)  # fmt: skip
OWN = list_of(list_of(TEXT, 3))
# What detectron2 knows of the classes of a data set in advance.
_OF_CLASSES = ("thing_classes", "thing_colors", "thing_dataset_id_to_contiguous_id")


@dataclass(frozen=True)
class Annotations:
    """What an annotation file holds.

    Attributes:
        classes: (id, name) of each class, by id; the networks number them in this order.
        objects: number of annotations that are not crowds; None without a list of annotations, as for COCO's test sets.
        without_mask: the id of an annotation without a segmentation; None if each has one.
    """

    classes: tuple[tuple[int, str], ...]
    objects: int | None
    without_mask: Any


def register_own(cfg: CfgNode) -> None:
    """Make the data sets of DATASETS.OWN known to detectron2. Files are looked for as those of MODEL.WEIGHTS are.

    Raises:
        UserError: no list of [name, annotation file, image folder], or a name that another data set has.
    """
    if not OWN.holds(cfg.DATASETS.OWN):
        raise UserError(
            "DATASETS.OWN must be a list of [name, annotation file, image folder], such as [[cells_train, "
            f"cells/train.json, cells/train]], not {shown(cfg.DATASETS.OWN)}"
        )
    for name, *places in cfg.DATASETS.OWN:
        file, folder = map(_found, places)
        if name not in DatasetCatalog:
            register_coco_instances(name, {}, file, folder)
        metadata = MetadataCatalog.get(name)
        if (metadata.get("json_file"), metadata.get("image_root")) != (file, folder):
            raise UserError(f"DATASETS.OWN: there is a data set {name!r} already; choose another name")


def _found(place: str) -> str:
    path = Path(expanded(place))
    return str(path if path.exists() or not (HERE / path).exists() else HERE / path)


def use_classes(cfg: CfgNode, names: Iterable[str]) -> None:
    """Take the classes from the annotation files of the data sets `names`, for `cfg` and for detectron2's metadata.

    Data sets in another format keep their own.

    Raises:
        UserError: a file that is not in COCO's format, files with different classes, a NUM_CLASSES of another number.
    """
    first: tuple[str, Annotations] | None = None
    for name in names:
        metadata = MetadataCatalog.get(name)
        if metadata.get("evaluator_type") != "coco" or not metadata.get("json_file"):
            continue
        path = metadata.json_file
        here = annotations_of(path)
        if first is not None and first[1].classes != here.classes:
            raise UserError(_difference(first, (path, here)))
        first = first or (path, here)
        _forget_classes(metadata, here)
    if first is not None:
        set_num_classes(cfg, len(first[1].classes), f"{first[0]} has", _named(first[1].classes))


def set_num_classes(cfg: CfgNode, count: int, what: str, which: str = "") -> None:
    """Set every NUM_CLASSES of `cfg` to `count`.

    Args:
        what: for the message: what has them.
        which: the classes in words.

    Raises:
        UserError: one was set to another number.
    """
    frozen = cfg.is_frozen()
    cfg.defrost()
    for key in NUM_CLASSES:
        if key.startswith("TEACHER.") and "TEACHER" not in cfg:
            continue
        given, (section, _, last) = setting(cfg, key), key.rpartition(".")
        if given not in (count, COCO_CLASSES):
            listed = f" ({which})" if which else ""
            raise UserError(f"{key} is {given}, but {what} {count} classes{listed}; leave the key out")
        setting(cfg, section)[last] = count
    if frozen:
        cfg.freeze()


def _forget_classes(metadata: Any, annotations: Annotations) -> None:
    """Let detectron2 take the classes of this file instead of those that it knows in advance by the data set's name."""
    known = metadata.get("thing_dataset_id_to_contiguous_id"), list(metadata.get("thing_classes") or ())
    own = {number: i for i, (number, _) in enumerate(annotations.classes)}, [name for _, name in annotations.classes]
    if known != own:
        for key in _OF_CLASSES:
            vars(metadata).pop(key, None)


def _named(classes: Iterable[tuple[int, str]], count: int = 5) -> str:
    names = [f"{number} {name}" for number, name in classes]
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _difference(one: tuple[str, Annotations], other: tuple[str, Annotations]) -> str:
    parts = []
    for (path, here), (_, there) in ((one, other), (other, one)):
        alone = [entry for entry in here.classes if entry not in there.classes]
        parts.append(f"{path} alone has {_named(alone) or 'none'}")
    return f"the data sets have different classes: {', '.join(parts)}; give all files the same `categories`"


def annotations_of(path: str | Path) -> Annotations:
    """What the annotation file `path` holds; read once for each state of the file.

    Raises:
        UserError: it cannot be read, or it is not in COCO's format; names the entry.
    """
    try:
        state = os.stat(path)
    except OSError:
        return _read(str(path), 0, 0)  # says why
    return _read(str(path), state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=16)
def _read(path: str, changed: int, size: int) -> Annotations:
    text = read_text(path, "annotations", "they must be a JSON file in COCO's format")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"annotations {path} are not valid JSON: {error}") from None

    def refuse(entry: str) -> UserError:
        return UserError(f"annotations {path}: {entry}; docs/detection.md, Your own data, describes the format")

    lists = {"images": True, "categories": True, "annotations": False}
    for key, needed in lists.items():
        entries = data.get(key, [] if not needed else None) if isinstance(data, dict) else None
        if not (isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)):
            raise refuse(f"no list `{key}` of objects")
        if needed and not entries:
            raise refuse(f"`{key}` is empty")
    problem = _problem(data)
    if problem:
        raise refuse(problem)
    objects = [a for a in data.get("annotations", []) if not a.get("iscrowd", 0)]
    return Annotations(
        classes=tuple(sorted((c["id"], c["name"]) for c in data["categories"])),
        objects=len(objects) if "annotations" in data else None,
        without_mask=next((a["id"] for a in objects if not a.get("segmentation")), None),
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _problem(data: dict[str, Any]) -> str:
    """The first entry of a COCO file that detectron2 would stumble over, in words; empty if there is none."""
    for category in data["categories"]:
        if not (isinstance(category.get("id"), int) and isinstance(category.get("name"), str)):
            return f"category {shown(category)} needs an `id`, a whole number, and a `name`"
    ids = {category["id"] for category in data["categories"]}
    if len(ids) < len(data["categories"]):
        return "two categories have the same `id`"
    for image in data["images"]:
        if not (_is_id(image.get("id")) and isinstance(image.get("file_name"), str)):
            return f"image {shown(image)} needs an `id` and a `file_name`"
        if not (_is_count(image.get("width")) and _is_count(image.get("height"))):
            return f"image {image['file_name']} needs a `width` and a `height`, in pixels"
    if len({image["id"] for image in data["images"]}) < len(data["images"]):
        return "two images have the same `id`"
    seen = set()
    for annotation in data.get("annotations", []):
        number, box = annotation.get("id"), annotation.get("bbox")
        if not (_is_id(number) and _is_id(annotation.get("image_id"))):
            return f"annotation {shown(annotation)} needs an `id` and an `image_id`"
        if number in seen:
            return f"two annotations have the `id` {number}"
        seen.add(number)
        if not _is_id(annotation.get("category_id")) or annotation["category_id"] not in ids:
            return f"annotation {number} has category_id {shown(annotation.get('category_id'))}, which no category has"
        if not (isinstance(box, list) and len(box) == 4 and all(isinstance(x, (int, float)) for x in box)):
            return f"annotation {number} needs a `bbox` [x, y, width, height], not {shown(box)}"
        if annotation.get("ignore"):
            return f'annotation {number} has "ignore", which is not supported; "iscrowd": 1 leaves it out'
    return ""
