"""The command `mdistiller`: the first argument names a command, the others are that command's.

Every command is a module of this package with `main(arguments, prog)`. It is imported when it is run, so that
`mdistiller --help` answers at once.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Sequence

from .. import __version__
from ..console import tool
from ..registry import unknown_name

_LOCAL_RANK = re.compile(r"--local[-_]rank=\d+")
COMMANDS = {
    "train": "train a student, with or without a teacher, as a YAML file describes",
    "eval": "score a trained network on a data set",
    "table": "run a plan of methods and seeds, and put the results into a table",
    "plot": "draw the curves of runs",
    "report": "make one HTML page of a run or of a table",
    "inspect-features": "plot a trained network's features and errors, and compare it with its teacher",
    "group-classes": "group the classes that a teacher confuses, for DCGD",
    "convert": "convert weights between torch checkpoints and safetensors",
    "export-head": "write the plain head of a DCGD student as an ordinary checkpoint",
    "models": "list the networks that can be named, with parameters and multiply-accumulates on request",
    "methods": "list the distillation methods, with their papers and hyper-parameters",
    "datasets": "list the data sets",
    "quickstart": "train and distil on scikit-learn's digits, in minutes",
}


def usage() -> str:
    """What `mdistiller --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join([
        "usage: mdistiller COMMAND ...", "", "commands:", *lines, "",
        "`mdistiller COMMAND --help` shows a command's options; `mdistiller --version` prints the version.",
    ])  # fmt: skip


@tool()
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the first of `arguments` (default: the command line) names."""
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    # `python -m torch.distributed.launch -m mdistiller train` puts it before the command.
    first = [word for word in given[:1] if _LOCAL_RANK.fullmatch(word)]
    name, *rest = given[len(first) :] or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return
    if name == "--version":
        print(__version__)
        return
    if name not in COMMANDS:
        raise unknown_name("command", name, COMMANDS)
    command = importlib.import_module(f".{name.replace('-', '_')}", __package__)
    command.main([*first, *rest], prog=f"mdistiller {name}")
