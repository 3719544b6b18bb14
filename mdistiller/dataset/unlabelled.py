"""Images without labels, for methods that learn from the teacher alone."""

from __future__ import annotations

import os
from pathlib import Path

from yacs.config import CfgNode as CN

from ..errors import UserError
from ._base import DatasetInfo, Split, configured_dict, missing, refuse_unused
from .folder import NO_VALIDATION
from .labels import NO_LABEL
from .listing import files_below
from .own_images import split_of
from .views import OF_ANY_SIZE, input_of


@configured_dict.register("images")
def images(cfg: CN) -> DatasetInfo:
    """All images at any depth below DATASET.ROOT, or DATASET.TRAIN, for training; those of DATASET.VAL for validation.

    The number of classes is DATASET.NUM_CLASSES; 0: the teacher's, which `engine.build.resolved` finds.
    """
    refuse_unused(cfg, "TRAIN", "VAL", *OF_ANY_SIZE)
    native = input_of(cfg)

    def read(root: Path, train: bool, skip_broken: bool = False) -> Split:
        return split_of([(path, NO_LABEL) for path in _files(root, cfg, train)], cfg, skip_broken)

    facts = cfg.DATASET.NUM_CLASSES, native.size, "any", read, tuple(native.mean), tuple(native.std)
    return DatasetInfo(*facts, labelled=False)


def _files(root: Path, cfg: CN, train: bool) -> list[str]:
    """The images of one part; those of DATASET.VAL are never trained on."""
    if not os.path.isdir(root):
        raise missing("a folder of images", root, "set DATASET.ROOT to it")
    if not train and not cfg.DATASET.VAL:
        raise UserError(f"which of the images in {root} are for validation? {NO_VALIDATION}")
    named = cfg.DATASET.TRAIN if train else cfg.DATASET.VAL
    folder = root / named
    if not os.path.isdir(folder):
        raise UserError(f"DATASET.{'TRAIN' if train else 'VAL'} {named} is no folder: there is no {folder}; correct it")
    found = files_below(folder)
    if not train or not cfg.DATASET.VAL:
        return found
    inner = _ended(root / cfg.DATASET.VAL)
    kept = [path for path in found if not _ended(os.path.dirname(path)).startswith(inner)]
    if not kept:
        raise UserError(f"all images of {folder} lie in DATASET.VAL {cfg.DATASET.VAL}; set another DATASET.TRAIN")
    return kept


def _ended(folder: str | Path) -> str:
    """The real path of a folder, with a separator at its end."""
    return os.path.join(os.path.realpath(folder), "")
