"""The embedded images are read once for all tests."""

from dataclasses import replace
from functools import cache

import pytest

from mdistiller.dataset import dataset_dict


@pytest.fixture(autouse=True, scope="session")
def images_are_read_once():
    info = dataset_dict["digits"]
    dataset_dict["digits"] = replace(info, read=cache(info.read))
    yield
    dataset_dict["digits"] = info
