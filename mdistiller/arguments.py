"""Arguments of command lines: paths and negative numbers."""

from __future__ import annotations

import argparse
import re
from typing import Any

from .paths import expanded


class PathArgument(argparse.Action):
    """The action of a command's argument that is a path, or several: `~` is expanded before the argument's `type`."""

    def __init__(self, *names: Any, type: Any = str, **options: Any) -> None:
        super().__init__(*names, **options)
        self._type = type

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        several = isinstance(values, list)
        paths = [self._type(expanded(value)) for value in (values if several else [values])]
        setattr(namespace, self.dest, paths if several else paths[0])


def with_numbers(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Let `parser` take every negative number for a value, as in `SOLVER.DOT.DELTA -7.5e-2`.

    Before Python 3.14, argparse takes those with an exponent for options; the infinite ones it always does.
    """
    parser._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)", re.IGNORECASE)
    return parser
