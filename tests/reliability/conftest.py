"""One zygote per pytest worker."""

import pytest

from .runs import Zygote


@pytest.fixture(scope="session")
def zygote():
    started = Zygote()
    yield started
    started.close()
