"""Which state dict a checkpoint's content holds: under the usual keys, or the one that is there, or that fits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from ...console import network_name, note
from ...errors import UserError
from .inert_pickle import StandIn
from .state_names import (
    State,
    below,
    below_any,
    beside,
    fitting,
    strip_module,
    without_attribute,
    without_counters,
)

# Keys of a checkpoint: the class of the network that its run deploys, where that is not the student alone, and the name
# of the deployment, where the run has several.
DEPLOYED, HEAD = "deployed", "head"
# State dicts lie under at most this many keys.
_DEPTH = 5


def marks(checkpoint: Any) -> dict[str, str]:
    """What a loaded checkpoint says of the network whose weights it holds: `DEPLOYED` and `HEAD`, if it says so."""
    known = checkpoint if isinstance(checkpoint, Mapping) else {}
    return {key: known[key] for key in (DEPLOYED, HEAD) if isinstance(known.get(key), str)}


def is_of_run(checkpoint: Any) -> bool:
    """Whether a loaded checkpoint holds a run's whole state (`latest`, `best`, `epoch_N`), not one network's."""
    return isinstance(checkpoint, Mapping) and "optimizer" in checkpoint


def is_state(state: Any) -> bool:
    return isinstance(state, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())


def states_in(content: Any) -> dict[str, State]:
    """Every set of named tensors in a file's content, by the keys that lead to it, such as "checkpoint.state_dict".

    What else lies beside the tensors is left out. A module that was saved whole gives its state dict.
    """
    return dict(_search(content, (), set()))


def _search(node: Any, keys: tuple[str, ...], seen: set[int]) -> Iterator[tuple[str, State]]:
    if id(node) in seen or len(keys) > _DEPTH:
        return
    seen.add(id(node))
    if _is_module(node):
        yield ".".join(keys), dict(_state_of_module(node, "", ()))
        return
    entries = list(_entries(node))
    tensors = {key: tensor for key, value in entries if (tensor := _tensor(value)) is not None}
    if tensors:
        yield ".".join(keys), tensors
    for key, value in entries:
        yield from _search(value, (*keys, key), seen)


def _entries(node: Any) -> Iterator[tuple[str, Any]]:
    """What a container holds, by its keys or by its indices."""
    for held in (node, node.state, node.args) if isinstance(node, StandIn) else (node,):
        if isinstance(held, (Mapping, list, tuple)):
            pairs = held.items() if isinstance(held, Mapping) else enumerate(held)
            yield from ((str(key), value) for key, value in pairs)


def _tensor(value: Any) -> Tensor | None:
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return torch.as_tensor(value)
    return value if isinstance(value, Tensor) else None


def _is_module(node: Any) -> bool:
    return isinstance(node, StandIn) and isinstance(node.state, dict) and isinstance(node.state.get("_modules"), dict)


def _state_of_module(module: StandIn, prefix: str, around: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    """What `state_dict()` of a module returns, read from its stand-in; `around`: the modules that hold it."""
    own = module.state
    for kind in ("_parameters", "_buffers"):
        for name, value in dict(own.get(kind) or {}).items():
            if isinstance(value, Tensor) and name not in own.get("_non_persistent_buffers_set", ()):
                yield f"{prefix}{name}", value
    for name, inner in own["_modules"].items():
        if _is_module(inner) and id(inner) not in around:
            yield from _state_of_module(inner, f"{prefix}{name}.", (*around, id(inner)))


def _usual_name(content: Any, states: Mapping[str, State]) -> str | None:
    """Which of the `states` is taken, whatever else a file holds: of "model", "state_dict", or the content itself."""
    node, keys = content, []
    for key in ("model", "state_dict"):
        if isinstance(node, Mapping) and isinstance(node.get(key), Mapping):
            node = node[key]
            keys.append(key)
    name = ".".join(keys)
    return name if name in states and (is_state(node) or name in likely(states)) else None


def likely(states: Mapping[str, State]) -> dict[str, State]:
    """Those that may be a network's, and not an optimizer's or some counters."""
    return {
        name: state for name, state in states.items()
        if "optim" not in name.lower() and any(key.rpartition(".")[2] in ("weight", "bias") for key in state)
    }  # fmt: skip


def distiller_state(checkpoint: Any, path: str | Path, key: str = "") -> State:
    """The whole state inside a loaded checkpoint, as it was saved, without the prefixes of wrappers.

    Args:
        key: see `model_state`.

    Raises:
        UserError: the checkpoint contains no state dict, or several; nothing under `key`.
    """
    states = states_in(checkpoint)
    if key:
        return strip_module(_called(states, key, path))
    usual = _usual_name(checkpoint, states)
    found = likely(states) if usual is None else {usual: states[usual]}
    if not found:
        raise UserError(f"{path} holds no network weights (neither a state dict nor one under 'model')")
    if len(found) > 1:
        raise _several(path, found)
    return strip_module(next(iter(found.values())))


def _called(states: Mapping[str, State], key: str, path: str | Path) -> State:
    """The state dict of the name `key`, or the entries of one whose names begin with it."""
    found = [states[key]] if key in states else [
        part for name, state in states.items() for rest in (key.removeprefix(f"{name}."), key)
        if (part := below_any(state, f"{rest}."))
    ]  # fmt: skip
    if not found:
        raise UserError(f"{path} holds no weights under {key!r}; it holds {_listed(likely(states))}")
    return found[0]


def _several(path: str | Path, names: Iterable[str], fit: str = "") -> UserError:
    return UserError(
        f"{path} holds several state dicts{fit}: {_listed(names)}; write the one to use to a file of its own with "
        f"tools/convert.py {path} FILE --key NAME"
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(name or "names without a prefix" for name in names) or "none"


def model_state(checkpoint: Any, path: str | Path, key: str = "") -> State:
    """The network's state inside a loaded checkpoint.

    Accepts {"model": state}, {"state_dict": state}, a bare state, the only state under any other keys, names with the
    prefixes of DataParallel and torch.compile, and a distiller's whole state, of which it returns the student's.

    Args:
        key: the state to take where there are several, such as "state_dict_ema", or the beginning of its names, such as
            "teacher".

    Raises:
        UserError: the checkpoint contains no state dict, or several; nothing under `key`; or it is a distiller's whose
            student is not deployed alone.
    """
    state = distiller_state(checkpoint, path, key)
    deployed = marks(checkpoint).get(DEPLOYED)
    if deployed and not key:
        if is_of_run(checkpoint):
            raise UserError(
                f"{path} belongs to a run that deploys a {deployed}, not its student alone; tools/eval.py without -m "
                "scores it"
            )
        return state
    return below(state, "student.") or state


class _Fit(NamedTuple):
    """The state dict `name` of a file has a network's names, after `prefix`."""

    name: str
    prefix: str
    state: State

    def __str__(self) -> str:
        return ".".join(filter(None, (self.name, self.prefix.rstrip("."))))


def fitting_state(network: nn.Module, checkpoint: Any, path: str | Path, ours: bool = False) -> State:
    """The state inside a loaded checkpoint that has the names of `network`; if none has, what `model_state` returns.

    That goes first; then any state dict, under any prefix. What else fits, or lies beside it, is named in a note.

    Args:
        ours: this package wrote the file, so that nothing else in it is meant.

    Raises:
        UserError: as `model_state`, or several fit.
    """
    states = states_in(checkpoint)
    usual = _usual_name(checkpoint, states)
    first = {} if usual is None else model_state(checkpoint, path)
    exact = fitting(network, first).get("")
    if marks(checkpoint).get(DEPLOYED) or is_grouped(first, network):
        return first
    fits = [_Fit(name, prefix, part) for name in states for prefix, part in fitting(network, states[name]).items()]
    others = [fit for fit in fits if fit.name != usual and not ours]
    of_distiller = usual is not None and bool(below(strip_module(states[usual]), "student."))
    chosen = [fit for fit in fits if fit.name == usual and not of_distiller] if exact is None else []
    if exact is None and not chosen:
        chosen, others = others, []
    if len(chosen := _different(chosen)) > 1:
        raise _several(path, map(str, chosen), f" that fit {network_name(network)}")
    if others:
        note(f"{path} also holds {_listed(map(str, others))}; tools/convert.py --key NAME writes one to its own file")
    if exact is not None:
        return exact
    if not chosen:
        return without_attribute(without_counters(first or model_state(checkpoint, path)))
    name, prefix, part = chosen[0]
    unused = beside(states[name], prefix)
    if unused:
        note(f"{path}: the {len(part)} entries under {prefix} are taken; {_listed(unused[:3])}"
             f"{', ...' if len(unused) > 3 else ''} left out")  # fmt: skip
    return part


def is_grouped(state: State, network: nn.Module) -> bool:
    """Whether a state is that of a student that DCGD grouped, and `network` is none."""
    return any(key.startswith("branches.") for key in state.keys() - network.state_dict().keys())


def _different(fits: list[_Fit]) -> list[_Fit]:
    """The `fits` without those of the same weights as an earlier one."""
    kept: list[_Fit] = []
    for fit in fits:
        if not any(_same(fit.state, other.state) for other in kept):
            kept.append(fit)
    return kept


def _same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
