"""Sets values in the configuration tree, from YAML and from `KEY VALUE` pairs, in the type of the default."""

from __future__ import annotations

import ast
import reprlib
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from yacs.config import CfgNode as CN

from ..errors import UserError
from ..registry import near_names


def override_pairs(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """["A.B", "1", ...] as [("A.B", "1"), ...].

    Raises:
        UserError: a key without a value.
    """
    if len(overrides) % 2:
        raise UserError(f"override {overrides[-1]!r} has no value; write KEY VALUE pairs, such as SOLVER.LR 0.1")
    return list(zip(overrides[::2], overrides[1::2]))


def merge(cfg: CN, tree: dict[Any, Any], above: tuple[str, ...]) -> None:
    """Set the values of `tree` in `cfg`, in place; `above` holds the keys that lead to `cfg` in the whole tree."""
    for key, value in tree.items():
        name = ".".join((*above, str(key)))
        if key not in cfg:
            near = [".".join((*above, k)) for k in near_names(str(key), cfg)]
            hint = f"did you mean {' or '.join(near)}?" if near else f"known keys: {', '.join(cfg)}"
            raise UserError(f"unknown config key {name!r}; {hint}")
        if isinstance(cfg[key], CN):
            if not isinstance(value, dict):
                keys = ", ".join(cfg[key])
                raise UserError(f"{name} is a section with keys {keys}; it cannot be set to {shown(value)}")
            merge(cfg[key], value, (*above, str(key)))
        else:
            cfg[key] = _coerce(name, value, cfg[key])


# A few lines of YAML aliases can stand for a value whose full text does not fit in memory.
_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother, _short.maxlong = 2, 200, 200, 200


def shown(value: Any) -> str:
    return _short.repr(value)


def _coerce(name: str, value: Any, default: Any) -> Any:
    """`value` in the type of `default`, or an error that says what is expected."""
    if isinstance(default, str):
        # YAML reads `TAG: 1` and `NAME: true` as a number and a bool, but they are text.
        if isinstance(value, (str, int, float)):
            return str(value)
        raise UserError(f"{name} must be text, not {shown(value)}")
    if isinstance(value, str):
        # Command-line values arrive as text, and so does YAML's 1e-4.
        # TypeError: `{{}}` is a set whose member cannot be hashed.
        with suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            value = ast.literal_eval({"true": "True", "false": "False"}.get(value.lower(), value))
    if isinstance(default, bool):
        if isinstance(value, bool):
            return value
        raise UserError(f"{name} must be True or False, not {shown(value)}")
    if isinstance(default, (int, float)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"{name} must be a number such as {default}, not {shown(value)}")
        with suppress(OverflowError):  # an int beyond all floats
            return float(value) if isinstance(default, float) else value
        raise UserError(f"{name} must be finite, not {shown(value)}")
    if isinstance(default, (list, tuple)):
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{name} must be a list such as {list(default)}, not {shown(value)}")
        if any(isinstance(item, bool) or not isinstance(item, (int, float)) for item in value):
            raise UserError(f"{name} must be a list of numbers such as {list(default)}, not {shown(value)}")
        return list(value)
    raise AssertionError(f"default of {name} has the unsupported type {type(default).__name__}")
