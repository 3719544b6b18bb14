"""The names in a state dict: what wrappers put in front of them and within, and which part of them a network has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch.nn as nn
from torch import Tensor

State = dict[str, Tensor]

# What wrappers insert into names: torch.compile, FSDP, activation checkpointing; and (Distributed)DataParallel.
_WRAPPER = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_ANY_WRAPPER = re.compile(rf"{_WRAPPER.pattern}|(?<![^.])module\.")
# Attributes under which another trainer's module holds its network.
_ATTRIBUTE = re.compile(r"(?:model|net|network|backbone|encoder|student)\.")
# Buffers that profilers (thop) and averaged models add; and the one that BatchNorm lacks in old versions of torch.
_ADDED = ("total_ops", "total_params", "n_averaged")
_COUNTERS = (*_ADDED, "num_batches_tracked")


def strip_module(state: Mapping[str, Tensor]) -> State:
    """The state without what torch.compile and FSDP insert into names, and the prefix `module.` of DataParallel."""
    return {_WRAPPER.sub("", name).removeprefix("module."): tensor for name, tensor in state.items()}


def without_counters(state: Mapping[str, Tensor]) -> State:
    """The state without what profilers and averaged models add."""
    return {name: tensor for name, tensor in state.items() if _last(name) not in _ADDED}


def without_attribute(state: State) -> State:
    """The state without the attribute that holds the network, such as `model.`, where all names begin with one."""
    found = _ATTRIBUTE.match(next(iter(state), ""))
    return below(state, found[0]) if found and all(name.startswith(found[0]) for name in state) else state


def below(state: Mapping[str, Tensor], prefix: str) -> State:
    """The entries whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def below_any(state: Mapping[str, Tensor], prefix: str) -> State:
    """As `below`, of the state as it is or else without all wrappers."""
    return below(state, prefix) or below(_unwrapped(state), prefix)


def beside(state: Mapping[str, Tensor], prefix: str) -> list[str]:
    """The names, but for counters, that `below_any` leaves out."""
    names = without_counters(state)
    return [name for name in names if not (name.startswith(prefix) or _ANY_WRAPPER.sub("", name).startswith(prefix))]


def fitting(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, State]:
    """The parts of `state` whose names are those of `network`, by the prefix of these names in `state`.

    Counters do not matter: the network's may be missing, and others are left out. If the shapes of some parts fit,
    parts of other shapes are left out too.
    """
    own = network.state_dict()
    found = _parts_named(own, state) or _parts_named(own, _unwrapped(state))
    same_shapes = {
        prefix: part for prefix, part in found.items()
        if all(tensor.shape == getattr(own[name], "shape", None) for name, tensor in part.items())
    }  # fmt: skip
    return same_shapes or found


def _parts_named(own: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, State]:
    wanted = _uncounted(own)
    found = {}
    # A network may hold all its layers under one attribute, and its file may lack that.
    for added in dict.fromkeys(("", _common_prefix(wanted))):
        names = {name.removeprefix(added) for name in wanted}
        longest = max(names, key=len, default="")
        for prefix in [name.removesuffix(longest) for name in state if f".{name}".endswith(f".{longest}")]:
            part = below(state, prefix)
            if names and _uncounted(part) == names:
                found[prefix] = {added + name: tensor for name, tensor in part.items() if added + name in own}
    return found


def _unwrapped(state: Mapping[str, Tensor]) -> State:
    """The state without any wrapper in its names; empty if two of them become one."""
    named = {_ANY_WRAPPER.sub("", name): tensor for name, tensor in state.items()}
    return named if len(named) == len(state) else {}


def _uncounted(names: Mapping[str, Any]) -> set[str]:
    return {name for name in names if _last(name) not in _COUNTERS}


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _common_prefix(names: set[str]) -> str:
    """The dotted prefix that all names have: "model." for model.0.weight and model.1.weight."""
    common = ""
    for a, b in zip(min(names, default="").split(".")[:-1], max(names, default="").split(".")):
        if a != b:
            break
        common += f"{a}."
    return common
