"""The malloc benchmark runs, and its child processes have malloc as they are told."""

import re

import pytest

from ._scripts import script

pytestmark = pytest.mark.slow


def test_a_small_comparison(tmp_path):
    with script("malloc") as malloc:
        args = malloc.parse(["--pairs", "resnet8x4-resnet8", "--steps", "1", "--rounds", "1", "--data", str(tmp_path)])
        table = malloc.compare("resnet8x4-resnet8", args)
    kept, usual = table.splitlines()[-2:]
    assert re.match(r"\| kept \| \d+ ", kept)
    assert re.match(r"\| as glibc has it \| \d+ .*\| 1\.00 \(1\.00-1\.00\) ", usual)


def test_the_variable_leaves_malloc_alone(monkeypatch):
    from mdistiller.engine.runtime.malloc import keep_freed_memory

    with script("malloc") as malloc:
        (name,) = malloc.AS_GLIBC_HAS_IT
    monkeypatch.setenv(name, "1")
    assert not keep_freed_memory()
