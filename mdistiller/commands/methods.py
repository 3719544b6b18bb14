"""List the distillation methods with their papers, and on request their hyper-parameters.

    mdistiller methods
    mdistiller methods dkd --settings      # with every hyper-parameter, its default and its range
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterator, Sequence

from ..api.lists import list_methods
from ..console import one_line, tool
from ..distillers import Distiller, distiller_dict, method_defaults, method_ranges
from ..engine.cfg import CFG
from ..engine.overrides import flat_settings, shown
from ..registry import unknown_name
from ._arguments import command_parser

_REFERENCE = re.compile(r"Reference:\s+(.*?arXiv\s+[\d.]*\d)", re.DOTALL)


def method_lines(pattern: str = "*", settings: bool = False) -> Iterator[str]:
    """A line for each method whose name fits `pattern`: its name, what it does, its paper.

    Args:
        settings: below it, a line for each of its hyper-parameters: `DKD.T 4.0 (above 0)`.

    Raises:
        UnknownNameError: none fits; the message suggests near names.
    """
    names = list_methods(pattern)
    if not names:
        raise unknown_name("method", pattern, distiller_dict)
    width = max(map(len, names))
    for name in names:
        method: type[Distiller] = distiller_dict[name]
        yield f"{name:{width}}  {described(method)}"
        if settings:
            yield from (f"{'':{width}}  {line}" for line in _settings(method))


def described(method: type[Distiller]) -> str:
    """What a method does, by the first sentence of its docstring, and the paper that its file names."""
    text = one_line((inspect.getdoc(method) or "").partition("\n\n")[0])
    paper = _paper(method)
    return f"{text} [{paper}]" if paper else text


def _paper(method: type[Distiller]) -> str:
    """The reference of the method's docstring, or else the first of its module; empty if there is none."""
    module = sys.modules[method.__module__]
    own = [value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__]
    texts = (inspect.getdoc(value) or "" for value in (method, *own))
    found = next(filter(None, map(_REFERENCE.search, texts)), None)
    return one_line(found[1]) if found else ""


def _settings(method: type[Distiller]) -> Iterator[str]:
    for section in sorted(method.config_sections(CFG) & method_defaults.keys()):
        for key, value in flat_settings(method_defaults[section]).items():
            allowed = method_ranges[section].get(key)
            yield f"{section}.{key} {shown(value)}" + (f" ({allowed.words})" if allowed else "")


def parse_args(arguments: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = command_parser(__doc__, prog)
    parser.add_argument("pattern", nargs="?", default="*", help="of the shell's kind, in quotes; case does not matter")
    parser.add_argument("--settings", action="store_true", help="every hyper-parameter with its default and its range")
    return parser.parse_args(arguments)


@tool()
def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    for line in method_lines(**vars(parse_args(arguments, prog))):
        print(line)
