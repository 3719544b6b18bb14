"""Checks of the files that a run needs, before anything is built."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from mdistiller.errors import UserError
from mdistiller.registry import unknown_name

from .. import HERE
from .annotations import annotations_of


def find_weights(name: str) -> str:
    """Find the file `name` of MODEL.WEIGHTS in the working folder or next to train_net.py; URLs are returned unchanged.

    Raises:
        UserError: it is in neither folder.
    """
    if not name or "://" in name:
        return name
    places = [Path(name), HERE / name]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise UserError(
            f"no weights at {' or '.join(map(str, places))}: put the published file there, or make it "
            "with detection/merge_weights.py; only a detector without a teacher can start from scratch, with "
            'MODEL.WEIGHTS ""'
        )
    return str(found)


def check_data(names: Iterable[str]) -> None:
    """Refuse data sets that are unknown, or whose annotations or images are missing.

    Raises:
        UserError: the message says where they belong.
    """
    for name in names:
        if name not in DatasetCatalog:
            raise unknown_name("data set", name, DatasetCatalog.list())
        metadata = MetadataCatalog.get(name)
        for place in (metadata.get("json_file"), metadata.get("image_root")):
            if place and not Path(place).exists():
                raise UserError(
                    f"{name} has no {place}: put COCO's annotations/, train2017/ and val2017/ under datasets/coco "
                    "beside train_net.py, or name the folder that holds coco in DETECTRON2_DATASETS; DATASETS.OWN "
                    "names data of your own"
                )


def check_objects(cfg: CfgNode) -> None:
    """Refuse training data without what the configuration trains on: objects and, for a Mask R-CNN, masks.

    Raises:
        UserError: names the annotation file.
    """
    for name in cfg.DATASETS.TRAIN:
        metadata = MetadataCatalog.get(name)
        if metadata.get("evaluator_type") != "coco" or not metadata.get("json_file"):
            continue
        annotations = annotations_of(metadata.json_file)
        if not annotations.objects:
            raise UserError(f"{metadata.json_file} annotates no object to train on; name another file in DATASETS")
        if cfg.MODEL.MASK_ON and annotations.without_mask is not None:
            raise UserError(
                f"MODEL.MASK_ON is True, but annotation {annotations.without_mask} of {metadata.json_file} has no "
                "`segmentation`; use a config without -Mask"
            )
