"""The tools' main(), called in this process, because a separate process takes seconds to start."""

import importlib.util
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def tool(monkeypatch):
    """Run a tool as its command line would: `tool("train.py", "--cfg", ...)`."""

    def run(name, *arguments):
        spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), REPOSITORY / "tools" / name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        module.main()

    return run


def tiny_config(method):
    """The text of a configuration that trains resnet8 by `method` on a few digits for an epoch."""
    return f"""
EXPERIMENT: {{PROJECT: p, NAME: run}}
DATASET: {{TYPE: digits, TRAIN_FRACTION: 0.05}}
DISTILLER: {{TYPE: {method}, STUDENT: resnet8}}
SOLVER: {{EPOCHS: 1}}
LOG: {{WANDB: false}}
"""


def keep_streams(patch):
    """Undo at the end what `outlive_terminal` does to the streams of this process."""
    for name in ("stdout", "stderr"):
        patch.setattr(sys, name, getattr(sys, name))


@pytest.fixture(autouse=True)
def streams_are_kept(monkeypatch):
    keep_streams(monkeypatch)
