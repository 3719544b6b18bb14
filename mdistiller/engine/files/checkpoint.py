"""Checkpoint files: written whole or not at all, read without running code, accepted in every form in use.

A run keeps two kinds. `latest`, `latest_previous` (the one before), `best` and `epoch_N` hold what resuming needs:
{"epoch", "model" (the distiller's state), "optimizer", "best_acc"}. `student_latest`, `student_best` and `student_N`
hold {"model": the student's state}. They are torch.save's files, with a checksum behind that torch.load overlooks.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ...console import one_line
from ...errors import UserError
from .atomic import SaveError, write_whole
from .checksum import check_seal, seal
from .safetensors_file import SUFFIX, read_safetensors

__all__ = [
    "SaveError", "load_checkpoint", "load_model_weights", "load_state", "model_state", "save_checkpoint",
    "strip_module",
]  # fmt: skip

State = dict[str, Tensor]


def save_checkpoint(obj: Any, path: str | Path, keep_previous: bool = False) -> None:
    """Write `obj` to `path`; a reader, or a run that is killed, finds the old file or the new one, never a part.

    Args:
        keep_previous: the file that is replaced stays as `<path>_previous`.

    Raises:
        SaveError: disk full, quota, read-only or vanished folder; what was there before is whole.
    """
    path = Path(path)
    archive = BytesIO()
    torch.save(obj, archive)
    write_whole(seal(archive), path, path.with_name(f"{path.name}_previous") if keep_previous else None)


def load_checkpoint(path: str | Path) -> Any:
    """What `path` holds, on the CPU; tensors and plain containers only, so that no file can run code.

    A .safetensors file is {"model": its tensors}.

    Raises:
        UserError: no such file, or it is not a whole checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        if path.suffix == SUFFIX:
            return {"model": read_safetensors(path)}
        check_seal(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on the form of a file that it then refuses, or takes
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
    if not is_state(state) or not state:
        raise UserError(f"{path} holds no network weights (neither a state dict nor one under 'model')")
    plain = strip_module(state)
    student = {k.removeprefix("student."): v for k, v in plain.items() if k.startswith("student.")}
    return student or plain


def is_state(state: Any) -> bool:
    return isinstance(state, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())


def strip_module(state: Mapping[str, Tensor]) -> State:
    """The state under its own names: without the `module.` that DataParallel puts in front of each."""
    return {k.removeprefix("module."): v for k, v in state.items()}


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
    reshaped = {
        k: f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    }
    missing = sorted(own.keys() - state.keys())
    if not (unknown or reshaped):
        # A module may stand in for entries that the original's files lack (VID), so it is asked what is missing.
        try:
            missing = list(module.load_state_dict(state, strict=False).missing_keys)
        except RuntimeError as error:  # tensors that cannot be copied: sparse, without data
            raise UserError(f"{path} does not fit {type(module).__name__}: {one_line(error)}") from None
    if not (unknown or missing) and (classes := _classes(module, state, reshaped)):
        which = _first_few([*reshaped.values()])
        raise UserError(f"{path} is of {classes[0]} classes, {type(module).__name__} of {classes[1]}: {which}")
    differences = {"missing": missing, "unknown": unknown, "of another shape": [*reshaped.values()]}
    if any(differences.values()):
        parts = [f"{len(keys)} {what} ({_first_few(keys)})" for what, keys in differences.items() if keys]
        raise UserError(f"{path} does not fit {type(module).__name__}: {'; '.join(parts)}")


def _classes(module: nn.Module, state: State, reshaped: Iterable[str]) -> tuple[int, int] | None:
    """The numbers of classes of `state` and of `module`, where they differ in nothing else."""
    outputs = set()
    for name in reshaped:
        layer, own, other = module.get_submodule(name.rpartition(".")[0]), module.state_dict()[name], state[name]
        if not isinstance(layer, nn.Linear) or not other.ndim or other.shape[1:] != own.shape[1:]:
            return None
        outputs.add((len(other), len(own)))
    return outputs.pop() if len(outputs) == 1 else None


def _first_few(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
