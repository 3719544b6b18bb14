"""The parameters to train: plain ones, and groups as torch.optim takes them, whose settings are their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch.nn as nn
from torch import Tensor

from ..errors import UserError

# {"params": parameters, "weight_decay": 0.0, "lr": ...}: a setting that is missing is the optimizer's.
Group: TypeAlias = dict[str, Any]
Learnable: TypeAlias = Iterable[nn.Parameter | Group]


def flat_parameters(learnable: Learnable) -> list[nn.Parameter]:
    """Every parameter, in the order in which parameters and groups list them.

    Raises:
        UserError: an entry is neither a parameter nor a group, or a parameter is listed twice; says where.
    """
    return [p for entry in _entries(learnable) for p in (entry["params"] if isinstance(entry, dict) else [entry])]


def parameter_groups(learnable: Learnable) -> list[Group]:
    """Copies of the groups, whose "params" are lists; before them, one group of all plain parameters, if there are any.

    Raises:
        UserError: see `flat_parameters`.
    """
    entries = _entries(learnable)
    plain = [entry for entry in entries if not isinstance(entry, dict)]
    return [*([{"params": plain}] if plain else []), *(entry for entry in entries if isinstance(entry, dict))]


def _entries(learnable: Learnable) -> list[nn.Parameter | Group]:
    """The parameters and copies of the groups, checked."""
    entries: list[Any] = []
    places: dict[int, str] = {}
    if not isinstance(learnable, Iterable):
        raise UserError(
            f"get_learnable_parameters() returns {type(learnable).__name__}, not a list of parameters or groups of them"
        )
    for i, entry in enumerate(learnable):
        if isinstance(entry, Mapping) and "params" in entry:
            params = entry["params"]
            params = [params] if isinstance(params, Tensor) else list(params)
            entries.append({**entry, "params": params})
            found = {f"parameter {j} of group {i}": p for j, p in enumerate(params)}
        else:
            entries.append(entry)
            found = {f"entry {i}": entry}
        for place, p in found.items():
            if not isinstance(p, Tensor):
                raise UserError(
                    f"learnable parameters: {place} is a {type(p).__name__}, "
                    'neither a parameter nor a group {"params": [...], ...}'
                )
            if id(p) in places:
                raise UserError(f"learnable parameters: {place} is {places[id(p)]} again")
            places[id(p)] = place
    return entries
