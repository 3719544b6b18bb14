"""Checkpoint files: written atomically, read without running code, accepted in every format in use.

A run keeps two kinds. `latest`, `latest_previous` (the one before), `best` and `epoch_N` hold what resuming needs:
{"epoch", "model" (the distiller's state), "optimizer", "best_acc"}. `student_latest`, `student_best` and `student_N`
hold {"model": the deployed network's state}. Where that is not the student alone, both say so under `DEPLOYED`. They
are files of torch.save with a checksum at the end, which torch.load ignores.
"""

from __future__ import annotations

import os
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
    "DEPLOYED", "HEAD", "SaveError", "distiller_state", "is_of_run", "load_checkpoint", "load_model_weights",
    "load_state", "marks", "model_state", "save_checkpoint", "strip_module",
]  # fmt: skip

State = dict[str, Tensor]

# Keys of a checkpoint: the class of the network that its run deploys, where that is not the student alone, and the name
# of the deployment, where the run has several.
DEPLOYED, HEAD = "deployed", "head"


def save_checkpoint(obj: Any, path: str | Path, keep_previous: bool = False) -> None:
    """Write `obj` to `path` atomically: even if the process is killed, `path` is the old file or the new one.

    Args:
        keep_previous: keep the replaced file as `<path>_previous`.

    Raises:
        SaveError: disk full, quota, read-only or vanished folder; the previous file is intact.
    """
    path = Path(path)
    archive = BytesIO()
    torch.save(obj, archive)
    write_whole(seal(archive), path, path.with_name(f"{path.name}_previous") if keep_previous else None)


def load_checkpoint(path: str | Path) -> Any:
    """The content of `path`, on the CPU: tensors and plain containers only, so that no file can run code.

    A .safetensors file is returned as {"model": its tensors} and its `marks`.

    Raises:
        UserError: no such file, or not an intact checkpoint.
    """
    path = Path(path)
    if not os.path.isfile(path):  # False for a name that no file system takes
        raise UserError(f"no checkpoint at {path}")
    try:
        if path.suffix == SUFFIX:
            tensors, metadata = read_safetensors(path)
            return {"model": tensors, **marks(metadata)}
        check_seal(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch also warns about the format of files that it then loads or refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails anywhere inside zipfile, pickle or torch
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path} is not a readable checkpoint (damaged, or it holds more than tensors and plain containers): "
            f"{reason[:200]}"
        ) from None


def model_state(checkpoint: Any, path: str | Path) -> State:
    """The network's state inside a loaded checkpoint.

    Accepts {"model": state}, {"state_dict": state}, a bare state, names with DataParallel's prefix `module.`, and a
    distiller's whole state, of which it returns the student's.

    Raises:
        UserError: the checkpoint contains no state dict, or it is a distiller's whose student is not deployed alone.
    """
    state = distiller_state(checkpoint, path)
    deployed = marks(checkpoint).get(DEPLOYED)
    student = {k.removeprefix("student."): v for k, v in state.items() if k.startswith("student.")}
    if deployed and is_of_run(checkpoint):
        raise UserError(
            f"{path} belongs to a run that deploys a {deployed}, not its student alone; tools/eval.py without -m "
            "scores it"
        )
    return state if deployed else student or state


def marks(checkpoint: Any) -> dict[str, str]:
    """What a loaded checkpoint says of the network whose weights it holds: `DEPLOYED` and `HEAD`, if it says so."""
    known = checkpoint if isinstance(checkpoint, Mapping) else {}
    return {key: known[key] for key in (DEPLOYED, HEAD) if isinstance(known.get(key), str)}


def distiller_state(checkpoint: Any, path: str | Path) -> State:
    """The whole state inside a loaded checkpoint, as it was saved, without DataParallel's prefix.

    Raises:
        UserError: the checkpoint contains no state dict.
    """
    state = checkpoint
    for key in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not is_state(state) or not state:
        raise UserError(f"{path} holds no network weights (neither a state dict nor one under 'model')")
    return strip_module(state)


def is_of_run(checkpoint: Any) -> bool:
    """Whether a loaded checkpoint holds a run's whole state (`latest`, `best`, `epoch_N`), not one network's."""
    return isinstance(checkpoint, Mapping) and "optimizer" in checkpoint


def is_state(state: Any) -> bool:
    return isinstance(state, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())


def strip_module(state: Mapping[str, Tensor]) -> State:
    """The state without the prefix `module.` that DataParallel adds to each name."""
    return {k.removeprefix("module."): v for k, v in state.items()}


def load_model_weights(model: nn.Module, path: str | Path) -> None:
    """Load the checkpoint at `path` into `model`, all of it or, if it does not fit, nothing.

    Raises:
        UserError: unreadable, or names or shapes differ; says which.
    """
    content = load_checkpoint(path)
    state = model_state(content, path)
    try:
        load_state(model, state, path)
    except UserError as error:
        held = _held_instead(model, content, state)
        if not held:
            raise
        raise UserError(f"{error}; it holds {held}") from None


def _held_instead(model: nn.Module, content: Any, state: State) -> str:
    """What a checkpoint holds that `model` is not, and what to do with it; nothing if that is not known."""
    if any(key.startswith("branches.") for key in state.keys() - model.state_dict().keys()):
        return (
            "a student that DCGD grouped: add --groups with DCGD.GROUPS of its run, or take its plain head from "
            "tools/export_head.py; tools/eval.py without -m reads the groups from the run's config.yaml"
        )
    deployed = marks(content).get(DEPLOYED)
    return f"the {deployed} that its run deploys, which tools/eval.py without -m scores" if deployed else ""


def load_state(module: nn.Module, state: State, path: str | Path) -> None:
    """Load `state` into `module`, strictly; `path` is used in the message only.

    Raises:
        UserError: names or shapes differ; the first few of each kind are named.
    """
    own = module.state_dict()
    unknown = sorted(state.keys() - own.keys())
    reshaped = {
        k: f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    }
    missing = sorted(own.keys() - state.keys())
    if not (unknown or reshaped):
        # A module may fill in entries that the original's files lack (VID does), so it reports itself what is missing.
        try:
            missing = list(module.load_state_dict(state, strict=False).missing_keys)
        except RuntimeError as error:  # tensors that cannot be copied: sparse or without data
            raise UserError(f"{path} does not fit {type(module).__name__}: {one_line(error)}") from None
    if not (unknown or missing) and (classes := _classes(module, state, reshaped)):
        which = _first_few([*reshaped.values()])
        raise UserError(f"{path} has {classes[0]} classes, {type(module).__name__} has {classes[1]}: {which}")
    differences = {"missing": missing, "unknown": unknown, "of another shape": [*reshaped.values()]}
    if any(differences.values()):
        kinds = [f"{len(keys)} {what} ({_first_few(keys)})" for what, keys in differences.items() if keys]
        raise UserError(f"{path} does not fit {type(module).__name__}: {'; '.join(kinds)}")


def _classes(module: nn.Module, state: State, reshaped: Iterable[str]) -> tuple[int, int] | None:
    """The numbers of classes of `state` and of `module` if nothing else differs, else None."""
    outputs = set()
    for name in reshaped:
        layer, own, other = module.get_submodule(name.rpartition(".")[0]), module.state_dict()[name], state[name]
        if not isinstance(layer, nn.Linear) or not other.ndim or other.shape[1:] != own.shape[1:]:
            return None
        outputs.add((len(other), len(own)))
    return outputs.pop() if len(outputs) == 1 else None


def _first_few(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
