"""Worker processes of loaders: how many there are, and that a signal to the whole process group leaves them alone.

`docker stop`, `scancel`, `timeout` and torchrun send SIGTERM to every process of a run. The training process finishes
its step and saves; for that it needs its workers. So a worker ignores SIGTERM, unless its own training process sends
it, and SIGINT; it ends when its training process has ended, however that came about.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader

from ..distributed.ranks import joined, of_environment
from ..system import held_signals, release_signals, usable_cpus
from .worker_failures import Pickling, Watched, silent_about_open_files

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A fork copies the locks that other threads hold at that moment, and in the child nobody releases them. The threads of
# torch.distributed take Python's for an instant after each message (CPython before 3.12 then waits for ever).
QUIET_SECONDS = 0.1
CHECK_SECONDS = 1.0  # how often a worker looks whether its training process lives


def worker_counts(num_workers: int) -> tuple[int, int]:
    """How many workers the training and the validation loader of this process start.

    Args:
        num_workers: for the training loaders of all ranks on this machine together; 0: no workers at all.

    Returns:
        This rank's share, at least one and at most the CPUs that this process may use; and a quarter of that, at
        least one: the validation loader's workers stay beside the others, idle while these work.
    """
    if num_workers <= 0:
        return num_workers, num_workers
    ranks = of_environment("LOCAL_WORLD_SIZE", 1, least=1)  # on this machine, as torchrun tells them
    train = max(1, min(num_workers // ranks, usable_cpus()))
    return train, max(1, train // 4)


def started(loader: Any, setting: str = "the loader's num_workers") -> Iterator[Any]:
    """`iter(loader)`; the workers of a torch DataLoader are guarded against signals, and never waited for in vain.

    Args:
        setting: what sets the number of workers, for the message.

    Raises:
        WorkerError: here or by `next`; see there. An error of the data set's own code stays as it is.
    """
    if not isinstance(loader, DataLoader) or not loader.num_workers:
        return iter(loader)
    if loader.persistent_workers and loader._iterator is not None:
        return Watched(loader, setting)  # the workers of the pass before
    if joined():
        time.sleep(QUIET_SECONDS)
    init, collate = loader.worker_init_fn, loader.collate_fn
    loader.worker_init_fn, loader.collate_fn = _Guarded(init), Pickling(collate)
    try:
        # Until `_guard` takes them over there; in this process, its other threads receive them.
        with held_signals(SIGNALS):
            return Watched(loader, setting)
    finally:
        loader.worker_init_fn, loader.collate_fn = init, collate


class _Guarded:
    """A DataLoader's `worker_init_fn`: `_guard`, then the loader's own, if it has one."""

    def __init__(self, own: Callable[[int], None] | None) -> None:
        self.own, self.owner = own, os.getpid()

    def __call__(self, worker: int) -> None:
        sys.excepthook = silent_about_open_files
        _guard(self.owner)
        if self.own is not None:
            self.own(worker)


def _guard(owner: int) -> None:
    """In a worker: take over SIGTERM and SIGINT, and end with the process `owner`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigtimedwait"):  # macOS, Windows; there torch's own check ends the worker
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        release_signals(SIGNALS)
        return
    # In place of torch's handler, which would end the process if another thread received the signal.
    signal.signal(signal.SIGTERM, _do_nothing)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with, args=(owner,), daemon=True).start()


def _end_with(owner: int) -> None:
    """End this process when `owner` sends SIGTERM, as it does to a worker that hangs, or is gone."""
    parent = os.getppid()  # the owner, or the server that forks for it
    while os.getppid() == parent and _exists(owner):
        received = signal.sigtimedwait({signal.SIGTERM}, CHECK_SECONDS)
        if received is not None and received.si_pid == owner:
            break
    os._exit(0)


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """A signal handler."""
