"""Checkpoint files: written atomically, read without running code, accepted in every form in use.

A run keeps two kinds. `latest`, `best` and `epoch_N` hold what resuming needs: {"epoch", "model" (the distiller's
state), "optimizer", "best_acc"}. `student_latest`, `student_best` and `student_N` hold {"model": the student's state}.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..errors import UserError

State = dict[str, Tensor]


def save_checkpoint(obj: Any, path: str | Path) -> None:
    """Write `obj` to `path`; a reader, or a run that is killed, finds the old file or the new one, never a part."""
    path = Path(path)
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save(obj, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def load_checkpoint(path: str | Path) -> Any:
    """What `path` holds, on the CPU; tensors and plain containers only, so that no file can run code.

    Raises:
        UserError: no such file, or it is not a whole checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails anywhere inside zipfile, pickle or torch
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path} is not a readable checkpoint (damaged, or not weights alone): {reason[:200]}"
        ) from None


def model_state(checkpoint: Any, path: str | Path) -> State:
    """The network's state inside a loaded checkpoint.

    Accepts {"model": state}, {"state_dict": state}, a bare state, names with DataParallel's `module.` in front, and
    a distiller's whole state, of which it takes the student.

    Raises:
        UserError: there is no state dict in it.
    """
    state = checkpoint
    for key in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path} holds no network weights (neither a state dict nor one under 'model')")
    plain = strip_module(state)
    student = {k.removeprefix("student."): v for k, v in plain.items() if k.startswith("student.")}
    return student or plain


def strip_module(state: Mapping[str, Tensor]) -> State:
    """The state under its own names: without the `module.` that DataParallel puts in front of each."""
    return {str(k).removeprefix("module."): v for k, v in state.items()}


def load_model_weights(model: nn.Module, path: str | Path) -> None:
    """Load the checkpoint at `path` into `model`, all of it or nothing.

    Raises:
        UserError: unreadable, or the names or shapes differ; says which.
    """
    load_state(model, model_state(load_checkpoint(path), path), path)


def load_state(module: nn.Module, state: State, path: str | Path) -> None:
    """Load `state` into `module`, strictly; `path` is for the message.

    Raises:
        UserError: names or shapes differ; the first few of each kind are named.
    """
    own = module.state_dict()
    unknown = sorted(state.keys() - own.keys())
    reshaped = [
        f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    missing = sorted(own.keys() - state.keys())
    if not (unknown or reshaped):
        # A module may stand in for entries that the original's files lack (VID), so it is asked what is missing.
        missing = list(module.load_state_dict(state, strict=False).missing_keys)
    differences = {"missing": missing, "unknown": unknown, "of another shape": reshaped}
    if any(differences.values()):
        parts = [f"{len(keys)} {what} ({_first_few(keys)})" for what, keys in differences.items() if keys]
        raise UserError(f"{path} does not fit {type(module).__name__}: {'; '.join(parts)}")


def _first_few(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
