"""Dictionaries of named components, whose error for an unknown name suggests known ones."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from .errors import UnknownNameError

T = TypeVar("T")


def near_names(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Up to `count` of the `known` names that resemble `name`, best first; case does not matter."""
    by_lower = {k.lower(): k for k in known}
    return [by_lower[m] for m in difflib.get_close_matches(name.lower(), by_lower, n=count, cutoff=0.5)]


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """The error for a `name` that is not in `known`; it suggests similar names, or else lists all of them."""
    known = sorted(known)
    near = near_names(name, known)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
    return UnknownNameError(f"unknown {kind} {name!r}; {hint}")


class Registry(dict[str, Any]):
    """A dict from names to components of one kind ("distiller", "model", ...).

    Raises:
        UnknownNameError: `registry[name]` for an unknown name; the message suggests similar names.
        ValueError: `register` for a name that is registered already.
    """

    def __init__(self, kind: str, entries: dict[str, Any] | None = None) -> None:
        super().__init__(entries or {})
        self.kind = kind

    def __missing__(self, name: str) -> Any:
        raise unknown_name(self.kind, name, self)

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: register the decorated class or function under `name`."""

        def enter(entry: T) -> T:
            if name in self:
                raise ValueError(f"{self.kind} {name!r} is registered already, as {self[name]!r}")
            self[name] = entry
            return entry

        return enter
