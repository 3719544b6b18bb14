"""What the code of a method says of it, so that a file that was written for the original needs no declarations."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

# The engine's own sections of the config tree.
_ENGINE = {"EXPERIMENT", "DATASET", "DISTILLER", "SOLVER", "LOG"}
# What every step passes to `forward_train`; the rest are fields of the batch that a method needs.
_ALWAYS = ("self", "image", "target", "epoch")


def infer(method: Any) -> None:
    """Declare for a class what its own functions read: fields of the batch, and EXPERIMENT.LOGIT_STAND."""
    own = vars(method)
    if "forward_train" in own:
        method.needs_batch = tuple(dict.fromkeys((*method.needs_batch, *_fields(own["forward_train"]))))
    if "standardizes_logits" not in own and any(_reads(function, "LOGIT_STAND") for function in own.values()):
        method.standardizes_logits = True


def sections_read(method: Any, known: Iterable[str]) -> set[str]:
    """Which of the `known` sections of the config tree the functions of a class, and of those above it, name."""
    functions = [function for cls in method.__mro__ for function in vars(cls).values() if inspect.isfunction(function)]
    named = {name for function in functions for name in function.__code__.co_names}
    return named.intersection(known) - _ENGINE


def _fields(forward_train: Any) -> list[str]:
    """The parameters of `forward_train` that it cannot do without, and that are not there anyway."""
    parameters = inspect.signature(forward_train).parameters.values()
    needed = (p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    return [p.name for p in needed if p.name not in _ALWAYS]


def _reads(function: Any, attribute: str) -> bool:
    """Whether `function` is one, and reads an attribute of this name."""
    return inspect.isfunction(function) and attribute in function.__code__.co_names
