"""What becomes of the memory of freed tensors on the CPU."""

from __future__ import annotations

import ctypes
import os
import platform

# mallopt's names for its settings, from glibc's malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
KEEP = {MMAP_MAX: 0, TRIM_THRESHOLD: -1}
# Where glibc's own adaptation ends in a process that frees large blocks.
GIVE_BACK = {MMAP_MAX: 65536, MMAP_THRESHOLD: 32 * 2**20, TRIM_THRESHOLD: 64 * 2**20}


def keep_freed_memory(keep: bool = True) -> bool:
    """Keep the memory of freed tensors in this process for the next ones, as torch does on a GPU.

    By default glibc hands large blocks back to the system, which clears every page of them again at the next step:
    tens of thousands of page faults a step for maps of 16 MiB. The process stays at its highest mark instead.

    Args:
        keep: False has glibc give freed memory back again, by the highest thresholds that it sets itself; its own
            adaptation of them cannot be had back.

    Returns:
        Whether it has been set: not without glibc, nor where the environment (MALLOC_TRIM_THRESHOLD_, say) has set
        malloc already.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    libc = ctypes.CDLL(None)
    done = [libc.mallopt(setting, value) == 1 for setting, value in (KEEP if keep else GIVE_BACK).items()]
    if not keep:
        libc.malloc_trim(0)
    return all(done)
