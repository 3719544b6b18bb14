"""Checkpoint files: written atomically, read without running code, accepted in every format in use.

A run keeps two kinds. `latest`, `latest_previous` (the one before), `best` and `epoch_N` hold what resuming needs:
{"epoch", "model" (the distiller's state), "optimizer", "best_acc"}. `student_latest`, `student_best` and `student_N`
hold {"model": the deployed network's state}. Where that is not the student alone, both say so under `DEPLOYED`. Both
describe the images that the network was trained on, see `described`. They are files of torch.save with a checksum at
the end, which torch.load ignores.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from ...console import network_name, note, one_line
from ...errors import UserError
from . import inert_pickle
from .atomic import SaveError, write_whole
from .checksum import check_seal, seal
from .description import (
    CLASS_NAMES,
    INPUT,
    check_classes,
    described,
    description_by,
    description_of,
    from_metadata,
)
from .file_kinds import is_safetensors, other_kind
from .inert_pickle import StandIn
from .safetensors_file import read_safetensors
from .state_names import State, strip_module, without_attribute, without_counters
from .states import (
    DEPLOYED,
    HEAD,
    distiller_state,
    fitting_state,
    is_grouped,
    is_of_run,
    is_state,
    likely,
    marks,
    model_state,
    states_in,
)

__all__ = [
    "CLASS_NAMES", "DEPLOYED", "HEAD", "INPUT", "OtherHead", "SaveError", "check_classes", "check_file_classes",
    "described", "description_by", "description_of", "distiller_state", "found_weights", "is_of_run", "is_state",
    "load_checkpoint", "load_model_weights", "load_state", "marks", "model_state", "save_checkpoint", "strip_module",
]  # fmt: skip


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
    """The content of `path`, on the CPU, read without running anything of it.

    Objects of other classes than tensors, arrays and plain containers are `StandIn`s. A safetensors file is returned as
    {"model": its tensors}, its `marks` and its `description_of` the images.

    Raises:
        UserError: no such file, or not an intact checkpoint; says what the file looks like.
    """
    return _read(Path(path))[0]


def _read(path: Path) -> tuple[Any, bool]:
    """The content of `path`, as `load_checkpoint`, and whether this package wrote the file: it has our checksum."""
    if not os.path.isfile(path):  # False for a name that no file system takes
        raise UserError(f"no checkpoint at {path}{', which is a folder' if os.path.isdir(path) else ''}")
    try:
        if is_safetensors(path):
            tensors, metadata = read_safetensors(path)
            return {"model": tensors, **marks(metadata), **from_metadata(metadata)}, "sha256" in metadata
        ours, kind = check_seal(path), other_kind(path)
        content = None if kind else _load(path)
    except Exception as error:  # a damaged file fails anywhere inside zipfile, pickle or torch
        raise UserError(f"{path} is not a readable checkpoint (damaged, or another kind): {_reason(error)}") from None
    if isinstance(content, StandIn) and not states_in(content):
        kind = f"a saved {type(content).__module__}.{type(content).__name__}; save a network's state_dict() instead"
    if kind:
        raise UserError(f"{path} is not a readable checkpoint: it looks like {kind}")
    return content, ours


def _load(path: Path) -> Any:
    with path.open("rb") as file, warnings.catch_warnings():  # not by the path, whose suffix torch may go by
        warnings.simplefilter("ignore")  # torch also warns about the format of files that it then loads or refuses
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            if os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0").lower() in ("1", "y", "yes", "true"):
                more = "it holds more than tensors and plain containers"
                raise ValueError(f"{more}, and TORCH_FORCE_WEIGHTS_ONLY_LOAD forbids to read it") from None
        file.seek(0)
        return torch.load(file, map_location="cpu", pickle_module=inert_pickle, weights_only=False)


def _reason(error: Exception) -> str:
    """An error in one line, without torch's advice to unpickle the file in a way that runs its code."""
    first = str(error).strip().partition("\n")[0]
    return first[:200] if first and "weights_only" not in str(error) else type(error).__name__


def check_file_classes(path: str | Path, class_names: Sequence[str] | None) -> None:
    """`check_classes` of the checkpoint file at `path`.

    Raises:
        UserError: it was trained on other classes than `class_names`, or cannot be read.
    """
    if class_names:
        check_classes(load_checkpoint(path), path, class_names)


def found_weights(path: str | Path, key: str = "") -> tuple[State, dict[str, Any]]:
    """The network's state in the file at `path`, for no network in particular, and what the checkpoint says of it.

    That is its `marks` and its `description_of` the images; with a `key`, the description alone, and nothing of a
    teacher, which may have been trained on others.

    Counters are left out, and from files of other trainers the attribute that held the network, such as `model.`.

    Args:
        key: see `model_state`.

    Raises:
        UserError: as `load_checkpoint` and `model_state`.
    """
    content, ours = _read(Path(path))
    state = without_counters(model_state(content, path, key))
    if not ours:
        state = without_attribute(state)
        names = list(likely(states_in(content)))
        if len(names) > 1 and not key:
            note(f"{path} holds several state dicts: {', '.join(names)}; --key NAME writes another one")
    described_too = {} if "teacher" in key.split(".") else description_of(content)
    return state, described_too if key else {**marks(content), **described_too}


class OtherHead(UserError):
    """A state that fits a network in all but the number of classes.

    Attributes:
        saved, own: the number of classes of the state and of the network.
        names: the entries of the head.
    """

    def __init__(self, message: str, saved: int, own: int, names: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.saved, self.own, self.names = saved, own, tuple(names)


def load_model_weights(model: nn.Module, path: str | Path, besides: Sequence[str] = ()) -> dict[str, Any]:
    """Load the checkpoint at `path` into `model`, all of it or, if it does not fit, nothing.

    Of a file with several state dicts, or names with a prefix, what has the names of `model` is loaded.

    Args:
        besides: entries of `model` that stay as they are, such as its head.

    Returns:
        The checkpoint's `description_of` the images that it was trained on.

    Raises:
        OtherHead: it is of another number of classes.
        UserError: unreadable, or names or shapes differ, says which; or several state dicts fit.
    """
    content, ours = _read(Path(path))
    state = fitting_state(model, content, path, ours)
    own = model.state_dict() if besides else {}
    try:
        load_state(model, {**state, **{name: own[name] for name in besides}}, path)
    except UserError as error:
        held = _held_instead(model, content, state)
        if not held:
            raise
        raise UserError(f"{error}; it holds {held}") from None
    return description_of(content)


def _held_instead(model: nn.Module, content: Any, state: State) -> str:
    """What a checkpoint holds that `model` is not, and what to do with it; nothing if that is not known."""
    if is_grouped(state, model):
        return (
            "a student that DCGD grouped: add --groups with DCGD.GROUPS of its run, or take its plain head from "
            "tools/export_head.py; tools/eval.py without -m reads the groups from the run's config.yaml"
        )
    deployed = marks(content).get(DEPLOYED)
    return f"the {deployed} that its run deploys, which tools/eval.py without -m scores" if deployed else ""


def load_state(module: nn.Module, state: State, path: str | Path) -> None:
    """Load `state` into `module`, strictly; `path` is used in the message only.

    Raises:
        OtherHead: only the number of classes differs.
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
            raise UserError(f"{path} does not fit {network_name(module)}: {one_line(error)}") from None
    if not (unknown or missing) and (classes := _classes(module, state, reshaped)):
        which = _first_few([*reshaped.values()])
        message = f"{path} has {classes[0]} classes, {network_name(module)} has {classes[1]}: {which}"
        raise OtherHead(message, *classes, [*reshaped])
    differences = {"missing": missing, "unknown": unknown, "of another shape": [*reshaped.values()]}
    if any(differences.values()):
        kinds = [f"{len(keys)} {what} ({_first_few(keys)})" for what, keys in differences.items() if keys]
        raise UserError(f"{path} does not fit {network_name(module)}: {'; '.join(kinds)}")


def _classes(module: nn.Module, state: State, reshaped: Iterable[str]) -> tuple[int, int] | None:
    """The numbers of classes of `state` and of `module` if nothing else differs, else None."""
    outputs = set()
    layers = {id(own): layer for layer in module.modules() for own in layer.parameters(recurse=False)}
    entries = module.state_dict(keep_vars=True)
    for name in reshaped:
        own, other = entries[name], state[name]
        head = isinstance(layers.get(id(own)), (nn.Linear, nn.Conv2d))  # SqueezeNet ends in a convolution
        if not head or not other.ndim or other.shape[1:] != own.shape[1:]:
            return None
        outputs.add((len(other), len(own)))
    return outputs.pop() if len(outputs) == 1 else None


def _first_few(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
