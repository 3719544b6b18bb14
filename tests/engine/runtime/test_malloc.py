"""Freed memory that the process keeps, measured by the page faults of a real process."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests._processes import REPOSITORY

CODE = """
import resource
import torch
from mdistiller.engine.runtime.malloc import keep_freed_memory

def faults():
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start

torch.ones(2**24)
print(faults(), keep_freed_memory(), torch.ones(2**24).sum().item(), faults(), keep_freed_memory(False), faults())
"""
PAGES = 10 * 64 * 2**20 // os.sysconf("SC_PAGE_SIZE")
huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
glibc_only = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
small_pages = pytest.mark.skipif(
    huge.exists() and "[always]" in huge.read_text(), reason="the system always uses huge pages: few faults to count"
)


def run(**environment):
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "THP_"))}
    found = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=REPOSITORY,
        env=plain | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return found.stdout.split()


@glibc_only
@small_pages
def test_kept_memory_is_not_cleared_again():
    before, kept, total, after, given_back, at_last = run()
    assert (kept, total, given_back) == ("True", str(2.0**24), "True")
    assert int(before) > PAGES / 2  # the pages are cleared each of the ten times
    assert int(after) < PAGES / 5  # at most once
    assert int(at_last) > int(after)  # more often again


@glibc_only
def test_malloc_settings_of_the_user_are_not_changed():
    _, kept, _, _, given_back, _ = run(MALLOC_TRIM_THRESHOLD_="1000000")
    assert (kept, given_back) == ("False", "False")
