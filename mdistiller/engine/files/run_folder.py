"""The checkpoints of one run: which one to resume from, which ones to remove."""

from __future__ import annotations

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
    """The newest intact checkpoint of a run: `latest`, else `latest_previous`, else the newest of `best` and `epoch_N`.

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

    found = next(whole("latest", "latest_previous"), None)
    if found is None:
        others = whole("best", *(path.name for path in _kept_epochs(folder, "epoch").values()))
        found = max(others, key=lambda other: other[0]["epoch"], default=None)
    if found is None:
        raise UserError("; ".join(damaged) or f"no checkpoint at {folder / 'latest'}")
    return *found, damaged


def prune(folder: str | Path, keep: int) -> None:
    """Remove all but the newest `keep` of the epoch_N, and of the student_N, in `folder`; 0 keeps all."""
    for stem in ("epoch", "student") if keep else ():
        kept = _kept_epochs(Path(folder), stem)
        for epoch in sorted(kept)[:-keep]:
            with suppress(OSError):
                kept[epoch].unlink()


def remove_run(folder: str | Path) -> None:
    """Remove a run's checkpoints before a new run uses its folder, so that the new run cannot resume from them."""
    folder = Path(folder)
    names = ["latest_previous", "best", *(path.name for path in folder.glob("student_*"))]
    names += [path.name for path in _kept_epochs(folder, "epoch").values()]
    for name in (*names, "latest"):  # `latest` last: until then, it marks the folder as holding a run
        (folder / name).unlink(missing_ok=True)


def _kept_epochs(folder: Path, stem: str) -> dict[int, Path]:
    """The files `<stem>_N` of a folder, by N."""
    found = ((re.fullmatch(rf"{stem}_(\d+)", path.name), path) for path in folder.glob(f"{stem}_*"))
    return {int(match[1]): path for match, path in found if match}
