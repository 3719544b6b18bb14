"""Runs written by hand, in a temporary folder."""

import pytest

from .experiments.hand_made import write_run


@pytest.fixture
def make_run(tmp_path):
    """make_run(name, rows, *overrides, config=, folder=): see `write_run`; `folder` replaces the new one."""

    def make(name, rows, *overrides, config="configs/digits/kd.yaml", folder=None):
        return write_run(folder or tmp_path / name, rows, *overrides, config=config)

    return make
