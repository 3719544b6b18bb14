"""One zygote per pytest worker; the small networks and data of runs in this process."""

import pytest

from mdistiller.dataset import dataset_dict
from mdistiller.models import cifar_model_dict

from . import small
from .runs import Zygote


@pytest.fixture(scope="session")
def zygote():
    started = Zygote()
    yield started
    started.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which `data` holds the small data sets."""
    found = tmp_path_factory.mktemp("small")
    small.write_data(found / "data")
    return found


@pytest.fixture
def registered(monkeypatch):
    """The small networks and data sets are known by name."""
    for names, own in ((cifar_model_dict, small.NETWORKS), (dataset_dict, small.DATA)):
        for name, entry in own.items():
            monkeypatch.setitem(names, name, entry)
