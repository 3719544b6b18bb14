"""Sets values in the configuration tree, from YAML and from `KEY VALUE` pairs, in the type of the default."""

from __future__ import annotations

import ast
import re
import reprlib
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from yacs.config import CfgNode as CN

from ..console import note
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


def note_repeats(overrides: Sequence[str]) -> None:
    """Say which settings are given more than once, of which the last value counts, as in the original."""
    pairs = override_pairs(overrides)
    for key, times in Counter(key for key, _ in pairs).items():
        if times > 1:
            note(f"{key} is given {times} times; the last value counts, {dict(pairs)[key]}")


def merge(cfg: CN, tree: dict[Any, Any], defaults: CN, above: tuple[str, ...] = ()) -> None:
    """Set the values of `tree` in `cfg`, in place, each in the type of its default.

    A default of None, and an empty list for its items, leaves the type open: numbers, text, True, False, None and lists
    of these, also lists of lists, are accepted. Text that reads as one of the others, such as "1e-4" or "None", is
    taken as that, also in quotes.

    Args:
        defaults: the tree as it was before anything was set; a value that was set does not narrow the type.
        above: the keys that lead to `cfg` in the whole tree.

    Raises:
        UserError: an unknown key, or a value of the wrong type.
    """
    for key, value in tree.items():
        own = key if isinstance(key, str) else shown(key)
        name = ".".join((*above, own))
        if key not in cfg:
            near = [".".join((*above, k)) for k in near_names(own, cfg)]
            hint = f"did you mean {' or '.join(near)}?" if near else f"known keys: {', '.join(cfg)}"
            if isinstance(key, bool):
                hint = f'YAML reads ON, OFF, YES and NO as true and false; write such a key in quotes, "ON" ({hint})'
            raise UserError(f"unknown config key {name!r}; {hint}")
        if isinstance(cfg[key], CN):
            if not isinstance(value, dict):
                keys = ", ".join(cfg[key])
                raise UserError(f"{name} is a section with keys {keys}; it cannot be set to {shown(value)}")
            merge(cfg[key], value, defaults[key], (*above, own))
        else:
            cfg[key] = _coerce(name, value, defaults[key])


def setting(cfg: CN, key: str) -> Any:
    """The value of the setting `key`, such as "SOLVER.LR", in the whole tree."""
    node: Any = cfg
    for part in key.split("."):
        node = node[part]
    return node


def flat_settings(cfg: CN, prefix: str = "") -> dict[str, Any]:
    """The tree as one dict with dotted keys: {"SOLVER.LR": 0.05, ...}."""
    flat: dict[str, Any] = {}
    for key, value in cfg.items():
        flat |= flat_settings(value, f"{prefix}{key}.") if isinstance(value, CN) else {f"{prefix}{key}": value}
    return flat


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write an int of more than 4300 decimal digits; YAML reads one from hexadecimal.
        return super().repr_int(x, level) if x.bit_length() < 10_000 else f"an int of {x.bit_length()} bits"


# A few lines of YAML aliases can stand for a value whose full text does not fit in memory.
_short = _Short()
_short.maxlevel, _short.maxstring, _short.maxother, _short.maxlong = 2, 200, 200, 200


def shown(value: Any) -> str:
    return _short.repr(value)


def _coerce(name: str, value: Any, default: Any) -> Any:
    """`value` in the type of `default`, or an error that says what is expected."""
    if default is None:
        return _open(name, value)
    if isinstance(default, str):
        # YAML reads `TAG: 1` and `NAME: true` as a number and a bool, but they are text.
        if isinstance(value, (str, int, float)):
            with suppress(ValueError):  # an int that Python refuses to write
                return str(value)
        raise UserError(f"{name} must be text, not {shown(value)}")
    if isinstance(value, str):
        value = _literal(value)
    if isinstance(default, bool):
        if isinstance(value, bool):
            return value
        raise UserError(f"{name} must be True or False, not {shown(value)}")
    if isinstance(default, (int, float)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"{name} must be a number such as {default}, not {shown(value)}")
        return _number(name, value, default)
    if isinstance(default, (list, tuple)):
        if isinstance(value, str) and all(isinstance(item, str) for item in default) and _WORDS.fullmatch(value):
            value = value.strip("[] ").replace(" ", "").split(",")
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{name} must be a list such as {list(default)}, not {shown(value)}")
        items, sample = _items(default)
        try:
            return type(default)(_open(name, value) if sample is None else [_coerce(name, v, sample) for v in value])
        except UserError:
            raise UserError(f"{name} must be a list of {items} such as {list(default)}, not {shown(value)}") from None
    raise AssertionError(f"default of {name} has the unsupported type {type(default).__name__}")


# A list of words as YAML writes it, and nothing that Python reads otherwise: [layer1, layer2.0].
_WORDS = re.compile(r"\[ *[\w.-]+( *, *[\w.-]+)* *\]")


def _literal(text: str) -> Any:
    """What `text` writes in Python, or `text` itself: command-line values arrive as text, and so does YAML's 1e-4."""
    # TypeError: `{{}}` is a set whose member cannot be hashed.
    with suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's own about what is not quite a literal, such as "1or" or "'\\d'"
        return ast.literal_eval({"true": "True", "false": "False", "null": "None"}.get(text.lower(), text))
    return text


def _number(name: str, value: int | float, default: Any) -> int | float:
    """`value` as a float if `default` is one, or if it is an int of more than 64 bits, which no tensor can hold."""
    if isinstance(value, int) and not isinstance(default, float) and -(2**63) <= value < 2**63:
        return value
    with suppress(OverflowError):  # an int beyond all floats
        return float(value)
    raise UserError(f"{name} must be finite, not {shown(value)}")


def _items(default: Sequence[Any]) -> tuple[str, Any]:
    """What a list's items are, in words, and a default for each of them."""
    if default and all(isinstance(item, bool) for item in default):
        return "True and False", default[0]
    if default and all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in default):
        return "numbers", next((item for item in default if isinstance(item, int)), default[0])
    if default and all(isinstance(item, str) for item in default):
        return "text", default[0]
    if default and all(isinstance(item, (list, tuple)) for item in default):
        return "lists", type(default[0])(item for inner in default for item in inner)
    return "numbers, text or lists of these", None


_DEEPEST = 2  # lists of lists; without a limit, YAML's aliases could write a list that never ends


def _open(name: str, value: Any, depth: int = 0) -> Any:
    """`value` for a default that leaves the type open, with tuples as lists; see `merge`."""
    read = _literal(value) if isinstance(value, str) else value
    if isinstance(read, str) and read != value:  # text in quotes: what is inside?
        return _open(name, read, depth)
    if read is None or isinstance(read, bool):
        return read
    if isinstance(read, (int, float)):
        return _number(name, read, read)
    if isinstance(read, (list, tuple)) and depth < _DEEPEST:
        return [_open(name, item, depth + 1) for item in read]
    if isinstance(value, str) and not isinstance(read, (list, tuple)):
        return value
    allowed = "a number, text, True, False, None, or a list or a list of lists of these"
    raise UserError(f"{name} must be {allowed}, not {shown(value)}")
