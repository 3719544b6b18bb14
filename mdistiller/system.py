"""The system calls that not every operating system has, each with what stands in for it where it is missing.

No other module uses `fcntl`, `resource`, `signal.SIGHUP` and their like, so that the package imports and trains on
Windows and macOS, too.
"""

from __future__ import annotations

import errno
import math
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None  # type: ignore[assignment]
try:
    import psutil
except ImportError:  # it is not built for every system, and only facts about processes hang on it
    psutil = None  # type: ignore[assignment]

# Of a lock file, the byte that is locked on Windows. No other process may read a locked byte there, so it lies far
# beyond the content.
_LOCKED_BYTE = 2**30


def in_forked_child(function: Callable[[], None]) -> None:
    """Call `function` in every process that is forked from this one; nothing on Windows, which does not fork."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)


def ignore_hangup() -> None:
    """Let this process live on when its terminal is closed. Windows ends it with its console, whatever it does."""
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


@contextmanager
def held_signals(numbers: Iterable[int]) -> Iterator[None]:
    """Hold back signals from this thread, and from the processes that it starts, in the `with` block."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows has no signals between processes
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def release_signals(numbers: Iterable[int]) -> None:
    """Let this thread receive the signals that `held_signals` held back when its process was started."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


def child_signal_handler() -> Any:
    """What handles the end of a child process, as `signal.getsignal` tells it; None on Windows."""
    return signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None


def lock(file: BinaryIO) -> None:
    """Lock an open file for this process, until it is closed or the process ends.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the file system has no locks.
    """
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    import msvcrt  # Windows alone has it

    file.seek(_LOCKED_BYTE)
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EDEADLOCK):
            raise BlockingIOError(error.errno, error.strerror) from None
        raise
    finally:
        file.seek(0)


def allocate(file: BinaryIO, size: int) -> None:
    """Make an open file at least `size` bytes long, with all of its disk space; new bytes are zero.

    Raises:
        OSError: the disk has no room.
    """
    missing = size - os.fstat(file.fileno()).st_size
    if missing <= 0:
        return
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    file.seek(0, os.SEEK_END)
    zeros = bytes(2**20)
    for done in range(0, missing, len(zeros)):
        file.write(zeros[: missing - done])
    file.flush()


def peak_memory() -> float:
    """The largest memory that this process has had so far, in MiB; NaN if this system does not tell."""
    if resource is not None:
        # Kilobytes on Linux, bytes on macOS.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    if psutil is not None:
        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss) / 2**20
    return math.nan


def free_memory() -> float:
    """Bytes of main memory that processes may still take without swapping; infinite if this system does not tell."""
    return psutil.virtual_memory().available if psutil is not None else math.inf


def usable_cpus() -> int:
    """The number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def own_ids() -> tuple[int, int]:
    """The numbers of this process's user and group; zeros on Windows, which has none."""
    return (os.getuid(), os.getgid()) if hasattr(os, "getuid") else (0, 0)


def process_start(pid: int) -> str | None:
    """When the process `pid` of this machine began: a text that its successor of the same number will not have.

    Returns:
        None if there is no such process; "" if this system does not tell.
    """
    if os.path.isdir("/proc/self"):  # Linux: in clock ticks, whatever becomes of the clock
        with suppress(OSError):
            return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()[19]
        return None
    if psutil is None:
        return ""
    with suppress(psutil.NoSuchProcess):
        return str(psutil.Process(pid).create_time())
    return None


def takes_colons(folder: str | Path) -> bool:
    """Whether names within `folder`, which need not exist yet, may have a `:`; not on Windows, nor on a FAT disk."""
    return _takes_colons(os.path.abspath(folder))


@lru_cache
def _takes_colons(folder: str) -> bool:
    while not os.path.isdir(folder) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    # A folder that cannot be written to says nothing about names.
    return _can_be_made(folder, ".a:b") or not _can_be_made(folder, ".a_b")


def _can_be_made(folder: str, name: str) -> bool:
    try:
        os.rmdir(tempfile.mkdtemp(prefix=name, dir=folder))
    except OSError:
        return False
    return True
