"""The checkpoints of one run: which one to resume from, which ones to remove."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import UserError
from .checkpoint import is_state, load_checkpoint

# The entries that resuming needs, and their types; the original's best_acc starts as an int.
RESUMABLE: dict[str, Any] = {"epoch": int, "model": Mapping, "optimizer": Mapping, "best_acc": (int, float, Tensor)}


def load_resumable(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint to resume from.

    Raises:
        UserError: no such file, damaged, or an entry that resuming needs is missing or of the wrong type.
    """
    state = load_checkpoint(path)
    if not isinstance(state, dict) or not RESUMABLE.keys() <= state.keys():
        raise UserError(f"{path} is not a checkpoint to resume from: it must hold epoch, model, optimizer and best_acc")
    for key, kind in RESUMABLE.items():
        if not isinstance(state[key], kind):
            found = type(state[key]).__name__
            raise UserError(f"{path} is not a checkpoint to resume from: its {key} is of type {found}")
    if not is_state(state["model"]):
        raise UserError(f"{path} is not a checkpoint to resume from: its model must hold named tensors only")
    return state


def newest_whole(folder: str | Path) -> tuple[dict[str, Any], Path, list[str]]:
    """The newest intact checkpoint of a run: `latest`, else the furthest of `latest_previous`, `best` and `epoch_N`.

    Returns:
        Its content, its path, and a line for each damaged checkpoint that was tried before it.

    Raises:
        UserError: there is none; says what is wrong with each checkpoint.
    """
    folder = Path(folder)
    damaged: list[str] = []

    def whole(*names: str) -> Iterator[tuple[dict[str, Any], Path]]:
        for path in (folder / name for name in names):
            try:
                yield load_resumable(path), path
            except UserError as error:
                if path.exists():
                    damaged.append(str(error))

    found = next(whole("latest"), None)
    if found is None:
        others = whole(*(name for name in resumable_files(folder) if name != "latest"))
        found = max(others, key=lambda other: _progress(other[0]), default=None)
    if found is None:
        raise UserError("; ".join(damaged) or f"no checkpoint at {folder / 'latest'}")
    return *found, damaged


def _progress(content: dict[str, Any]) -> tuple[int, bool]:
    """How far a checkpoint is: its epochs, and whether it is within the next one."""
    return content["epoch"], bool(content.get("within_epoch"))


def prune(folder: str | Path, keep: int) -> None:
    """Remove all but the newest `keep` of the epoch_N, and of the student_N, in `folder`; 0 keeps all."""
    for stem in ("epoch", "student") if keep else ():
        kept = _kept_epochs(Path(folder), stem)
        for epoch in sorted(kept)[:-keep]:
            with suppress(OSError):
                kept[epoch].unlink()


def check_no_run(folder: str | Path) -> None:
    """Refuse a folder in which a run's checkpoints stand, for a new run would replace or remove them.

    Raises:
        UserError: naming one of them and what to do.
    """
    resumable, students = resumable_files(folder), _student_files(folder)
    if not resumable and not students:
        return
    proceed = "add --resume to continue it, or --overwrite to replace it" if resumable else (
        "nothing in it can be resumed; add --overwrite to replace it, or take another EXPERIMENT.NAME"
    )  # fmt: skip
    raise UserError(f"{folder} already holds a run; {proceed} ({[*resumable, *students][0]} stands there)")


def resumable_files(folder: str | Path) -> list[str]:
    """Names of the files in `folder` that a run may be resumed from, `latest` first."""
    names = ["latest", "latest_previous", "best"]
    names += [path.name for path in _kept_epochs(Path(folder), "epoch").values()]
    return [name for name in names if os.path.exists(Path(folder) / name)]  # False for a name that is too long


def _student_files(folder: str | Path) -> list[str]:
    return sorted(name for name in _names(Path(folder)) if name.startswith("student_"))


def remove_run(folder: str | Path) -> None:
    """Remove a run's checkpoints before a new run uses its folder, so that the new run cannot resume from them.

    Raises:
        UserError: one of them cannot be removed, such as a directory of that name.
    """
    for name in (*resumable_files(folder), *_student_files(folder)):
        path = Path(folder) / name
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot remove {path} ({error.strerror or error}); move it away, or take another EXPERIMENT.NAME"
            ) from None


def _kept_epochs(folder: Path, stem: str) -> dict[int, Path]:
    """The files `<stem>_N` of a folder, by N."""
    found = ((re.fullmatch(rf"{stem}_(\d+)", name), folder / name) for name in _names(folder))
    return {int(match[1]): path for match, path in found if match}


def _names(folder: Path) -> list[str]:
    """The names of what a folder holds; none where it cannot be listed, and then nothing can be written there."""
    with suppress(OSError):
        return os.listdir(folder)
    return []
