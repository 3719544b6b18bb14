"""Networks by name, and the checkpoint files of teachers."""

from __future__ import annotations

import os
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
    """The network `name` with freshly initialised weights.

    Args:
        models: one of the model dictionaries; its entries are constructors, or pairs that begin with one.
        num_classes: width of the logits.
        kwargs: further arguments of the constructor (`pretrained` of the ImageNet models).

    Raises:
        UnknownNameError: no such model; the message lists similar names.
    """
    entry = models[name]
    constructor = entry[0] if isinstance(entry, tuple) else entry
    return constructor(num_classes=num_classes, **kwargs)


def teacher_checkpoint(path: str | Path | None, name: str = "the teacher", setting: str = _OWN_FILE) -> Path:
    """The file that holds a teacher's, or another network's, weights.

    A user's path is first tried unchanged. Then a relative path, or a default under the repository's download_ckpts/,
    is looked for in the current folder's download_ckpts/, and last in the repository's.

    Args:
        path: from a model dictionary or from `DISTILLER.TEACHER_CKPT`; None when neither names one.
        name: of the network, for the message.
        setting: what the message names to set to a file.

    Raises:
        UserError: the file does not exist, or `path` is None.
    """
    if not path:
        raise UserError(f"{name} has no published checkpoint; set {setting} to a file")
    wanted = Path(path)
    places = [wanted]
    if wanted.is_relative_to(REPOSITORY_FOLDER):
        wanted, places = wanted.relative_to(REPOSITORY_FOLDER), []
    if not wanted.is_absolute():
        places += [Path.cwd() / FOLDER / wanted, REPOSITORY_FOLDER / wanted]
    for place in places:
        if os.path.isfile(place):
            return place
    tried = " or ".join(map(str, dict.fromkeys(places)))
    raise UserError(f"no checkpoint of {name} at {tried}; put it there or set {setting} to another file")
