"""From names to networks, and from teachers to the files of their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn as nn

from ..errors import UserError
from ..paths import SHIPPED
from ..registry import Registry

FOLDER = "download_ckpts"
_OWN_FILE = "DISTILLER.TEACHER_CKPT (tools/eval.py: -c)"
REPOSITORY_FOLDER = SHIPPED / FOLDER


def default_checkpoint(path: str) -> str:
    """Where the repository keeps a published teacher; `path` is relative to download_ckpts/."""
    return str(REPOSITORY_FOLDER / path)


def build_model(models: Registry, name: str, num_classes: int, **kwargs: Any) -> nn.Module:
    """The network `name` with freshly drawn weights.

    Args:
        models: one of the model dictionaries; its entries are constructors, or pairs that begin with one.
        num_classes: width of the logits.
        kwargs: what else the constructor takes (`pretrained` of the ImageNet models).

    Raises:
        UnknownNameError: no such model; the message gives the near names.
    """
    entry = models[name]
    constructor = entry[0] if isinstance(entry, tuple) else entry
    return constructor(num_classes=num_classes, **kwargs)


def teacher_checkpoint(path: str | Path | None, name: str = "the teacher") -> Path:
    """The file that holds a teacher's weights.

    A relative path, and a default under the repository's download_ckpts/, is looked for in the current folder's
    download_ckpts/ first and in the repository's then; what the user wrote is tried as it stands before both.

    Args:
        path: from a model dictionary or from `DISTILLER.TEACHER_CKPT`; None when neither names one.
        name: of the teacher, for the message.

    Raises:
        UserError: no file is there, or `path` is None.
    """
    if not path:
        raise UserError(f"{name} has no published checkpoint; name a file by {_OWN_FILE}")
    wanted = Path(path)
    places = [wanted]
    if wanted.is_relative_to(REPOSITORY_FOLDER):
        wanted, places = wanted.relative_to(REPOSITORY_FOLDER), []
    if not wanted.is_absolute():
        places += [Path.cwd() / FOLDER / wanted, REPOSITORY_FOLDER / wanted]
    for place in places:
        if place.is_file():
            return place
    tried = " or ".join(map(str, dict.fromkeys(places)))
    raise UserError(f"no checkpoint of {name} at {tried}; put it there or name another file by {_OWN_FILE}")
