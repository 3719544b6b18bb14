"""Fixtures of several tests of the engine."""

import pytest


@pytest.fixture
def yaml_file(tmp_path):
    """yaml_file(text): the path of a configuration file with that text."""

    def write(text):
        path = tmp_path / "experiment.yaml"
        path.write_text(text)
        return path

    return write
