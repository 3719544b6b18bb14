"""Keeps the memory of freed tensors for new ones, on the CPU."""

from __future__ import annotations

import ctypes
import os
import platform

# The parameters of mallopt, from glibc's malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
KEEP = {MMAP_MAX: 0, TRIM_THRESHOLD: -1}
# The highest thresholds that glibc sets itself in a process that frees large blocks.
GIVE_BACK = {MMAP_MAX: 65536, MMAP_THRESHOLD: 32 * 2**20, TRIM_THRESHOLD: 64 * 2**20}


def keep_freed_memory(keep: bool = True) -> bool:
    """Keep the memory of freed tensors in this process for the next ones, as torch does on a GPU.

    By default glibc returns large blocks to the system, which clears every page of them again at the next step: tens
    of thousands of page faults per step for feature maps of 16 MiB. With `keep` the process stays at its peak memory.

    Args:
        keep: False makes glibc return freed memory again, with the highest thresholds that it sets itself; its own
            adaptation of the thresholds cannot be restored.

    Returns:
        Whether it has been set. False without glibc, or if the environment sets malloc already (for example with
        MALLOC_TRIM_THRESHOLD_).
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    libc = ctypes.CDLL(None)
    done = [libc.mallopt(setting, value) == 1 for setting, value in (KEEP if keep else GIVE_BACK).items()]
    if not keep:
        libc.malloc_trim(0)
    return all(done)
