"""Drawing in a notebook's process, whose MPLBACKEND this Python cannot load, and without a display."""

import os
import subprocess
import sys

import pytest

from ._processes import REPOSITORY

# A name that is not installed: what `inline` is to a virtual environment without matplotlib-inline.
NOTEBOOK = {"MPLBACKEND": "not_installed", "DISPLAY": ""}
TOOLS = sorted(path.name for path in (REPOSITORY / "tools").glob("*.py"))


def python(*arguments: str, cwd=REPOSITORY) -> subprocess.CompletedProcess[str]:
    environment = os.environ | NOTEBOOK | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=cwd, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_starts_with_the_backend_of_a_notebook(tool):
    done = python(f"tools/{tool}", "--help")
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


@pytest.mark.parametrize("backend", ["not_installed", "module://not_installed", "TkAgg", "agg", "svg"])
def test_a_figure_is_drawn_and_the_notebook_keeps_its_backend(tmp_path, backend):
    code = f"""
import os, sys
os.environ["MPLBACKEND"] = {backend!r}
from mdistiller.figures import new_figure
assert "matplotlib" not in sys.modules
for number in (1, 2):
    figure = new_figure(2, 1)
    figure.add_subplot().plot([0, 1], [0, 1])
    figure.savefig("figure.png"), figure.savefig("figure.svg")
assert "matplotlib.pyplot" not in sys.modules
import matplotlib
print(os.environ["MPLBACKEND"], matplotlib.rcParams["backend"])
"""
    done = python("-c", code, cwd=tmp_path)
    own = "agg" if backend == "not_installed" else backend
    assert (done.returncode, done.stdout.lower()) == (0, f"{backend} {own}\n".lower()), done.stderr
    assert (tmp_path / "figure.png").stat().st_size and (tmp_path / "figure.svg").stat().st_size


def test_training_and_every_command_import_without_matplotlib():
    code = """
import importlib, pkgutil, sys
from mdistiller import commands
for module in pkgutil.iter_modules(commands.__path__):
    importlib.import_module(f"mdistiller.commands.{module.name}")
assert "matplotlib" not in sys.modules
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
