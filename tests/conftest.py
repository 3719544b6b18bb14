"""Runs written by hand, in a temporary folder; the log on the terminal."""

import pytest

from mdistiller.console import log_to_terminal

from .experiments.hand_made import write_run


@pytest.fixture
def make_run(tmp_path):
    """make_run(name, rows, *overrides, config=, folder=): see `write_run`; `folder` replaces the new one."""

    def make(name, rows, *overrides, config="configs/digits/kd.yaml", folder=None):
        return write_run(folder or tmp_path / name, rows, *overrides, config=config)

    return make


@pytest.fixture(autouse=True, scope="session")
def the_log_is_on_the_terminal():
    """As in every tool: `capsys` sees warnings on stderr, and the progress of a run on stdout."""
    log_to_terminal()
