"""Import benchmarks as modules: they are scripts outside the package that import each other by plain names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@contextmanager
def script(name: str) -> Iterator[ModuleType]:
    """Import benchmarks/`name`.py; afterwards, all modules of that folder are dropped from sys.modules."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module(name)
    for module in {path.stem for path in FOLDER.glob("*.py")} - before:
        sys.modules.pop(module, None)
