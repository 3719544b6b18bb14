"""`distiller_dict`, which maps names to methods, and the methods' hyper-parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from yacs.config import CfgNode as CN

from ..ranges import Range
from ..registry import Registry

distiller_dict = Registry("distiller")
# Each method's default hyper-parameters by their section of the config tree; `engine/cfg.py` reads it.
method_defaults: dict[str, CN] = {}
# Their ranges: section -> dotted key below it -> the allowed values; `engine/cfg.py` refuses all others.
method_ranges: dict[str, dict[str, Range]] = {}


def register(
    name: str, defaults: CN | None = None, section: str | None = None, ranges: Mapping[str, Range] | None = None
) -> Callable[[type], type]:
    """Class decorator: add a method to `distiller_dict` and its hyper-parameters to the config tree.

    Args:
        name: the method's name in `DISTILLER.TYPE`.
        defaults: its hyper-parameters; None when another file declares them.
        section: their section of the config tree; `name` by default.
        ranges: their allowed values by dotted key below the section: {"TEMPERATURE": POSITIVE, ...}.

    Raises:
        ValueError: the name or the section is taken, or see `declare_defaults`.
    """

    def enter(cls: type) -> type:
        if defaults is not None:
            declare_defaults(section or name, defaults, ranges)
        elif ranges:
            raise ValueError(f"{name!r} has ranges but no defaults; give them to declare_defaults, with the defaults")
        cls.config_section = section or name  # type: ignore[attr-defined]
        return distiller_dict.register(name)(cls)

    return enter


def declare_defaults(section: str, defaults: CN, ranges: Mapping[str, Range] | None = None) -> None:
    """Put `defaults` into the config tree under `section`; for hyper-parameters that several methods share.

    Args:
        ranges: see `register`.

    Raises:
        ValueError: the section is taken, a range has no default, or a default is outside its range.
    """
    if section in method_defaults:
        raise ValueError(f"config section {section!r} is declared already")
    for key, allowed in (ranges or {}).items():
        value: Any = defaults
        for part in key.split("."):
            value = value.get(part, {}) if isinstance(value, CN) else {}
        if isinstance(value, dict):
            raise ValueError(f"{section} has a range for {key!r}, but no such hyper-parameter")
        if not allowed.holds(value):
            raise ValueError(f"the default of {section}.{key} must be {allowed.words}, not {value!r}")
    method_defaults[section] = defaults
    method_ranges[section] = dict(ranges or {})
