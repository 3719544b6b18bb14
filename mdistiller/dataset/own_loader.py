"""The data set "loader": that of a run whose loaders a caller brings, as `mdistiller.distill` does.

Its facts are settings, so that config.yaml describes the run's networks; its images are the caller's.
"""

from __future__ import annotations

from pathlib import Path

from yacs.config import CfgNode as CN

from ..errors import UserError
from ._base import DatasetInfo, Split, configured_dict

OWN_LOADER = "loader"


@configured_dict.register(OWN_LOADER)
def facts(cfg: CN) -> DatasetInfo:
    """The facts of a run with loaders of the caller's own.

    Raises:
        UserError: the settings do not tell them, because no caller has.
    """
    data = cfg.DATASET
    if not (data.NUM_CLASSES and data.IMAGE_SIZE):
        raise _no_files()
    return DatasetInfo(data.NUM_CLASSES, data.IMAGE_SIZE, "any", _read, tuple(data.MEAN), tuple(data.STD))


def _read(root: Path, train: bool, skip_broken: bool = False) -> Split:
    raise _no_files()


def _no_files() -> UserError:
    return UserError(
        f"DATASET.TYPE {OWN_LOADER} means loaders that a Python program gives to mdistiller.distill, and no command "
        "can read them; run that program, or name a data set, such as DATASET.TYPE folder"
    )
