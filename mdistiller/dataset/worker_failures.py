"""What is said when a loader's worker fails: it is gone, could not be started, or could not hand on its batch.

Such a worker is never waited for without end: it is a WorkerError.
"""

from __future__ import annotations

import errno
import os
import pickle
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.reduction import ForkingPickler
from types import FrameType, TracebackType
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

from ..console import one_line
from ..errors import UserError
from ..system import child_signal_handler


class RefusedError(UserError):
    """The system refuses what it takes to read a batch or to send it. From a worker it comes as a WorkerError."""


class WorkerError(UserError):
    """A loader's worker is gone, could not be started, or could not hand on its batch."""


class Watched:
    """The iterator of a DataLoader with workers, whose failures are WorkerErrors."""

    def __init__(self, loader: DataLoader[Any], setting: str) -> None:
        self._setting = setting
        self._batches: Any = loader._iterator  # of the pass before, or None
        with self._failures():
            try:
                self._batches = iter(loader)
            except Exception as error:
                _spare_half_made(error)
                raise
        _Deaths.take_over()

    def __iter__(self) -> Watched:
        return self

    def __next__(self) -> Any:
        with self._failures():
            return next(self._batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            with _Deaths.told():
                yield
        except (RuntimeError, OSError, EOFError, RefusedError) as error:
            failure = _failure(error, getattr(self._batches, "_workers", ()))
            if failure is None:
                raise
            raise WorkerError(f"{failure}, or take fewer workers ({self._setting}; 0: none)") from None


def _spare_half_made(error: Exception) -> None:
    """Let the iterator that `error` kept from being made end in silence: its `__del__` reads what it does not have."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        own = frame.f_locals.get("self")
        if isinstance(own, _BaseDataLoaderIter) and not hasattr(own, "_workers_status"):
            own._shutdown = True  # type: ignore[attr-defined]


class Pickling:
    """A DataLoader's `collate_fn`: its own, then the pickling that shares the batch's tensors with the other process.

    torch leaves that to a thread of the worker's queue. An error there is only printed, and the batch never comes.
    """

    def __init__(self, own: Callable[[Any], Any]) -> None:
        self.own = own

    def __call__(self, samples: Any) -> _Pickled:
        batch = self.own(samples)
        try:
            return _Pickled(batch)
        except OSError as error:
            raise RefusedError(_reason(error)) from error


def _reason(error: OSError) -> str:
    """What the system refuses, in one line.

    Where no more files can be opened, `tempfile` only says that it has found no folder.
    """
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as refused:
        return one_line(refused)
    return one_line(error)


def silent_about_open_files(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A worker's `sys.excepthook`, which says nothing of too many open files.

    multiprocessing's thread that sends files prints that at every try; the training process says it once.
    """
    if not (isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)):
        sys.__excepthook__(kind, error, trace)


class _Pickled:
    """A pickled object, which becomes that object when it is unpickled."""

    def __init__(self, content: Any) -> None:
        self.pickled = bytes(ForkingPickler.dumps(content))

    def __reduce__(self) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
        return pickle.loads, (self.pickled,)


class _Deaths:
    """A handler of SIGCHLD around torch's, which raises an error when a worker has died, wherever the process is.

    That may be within a save. So the error is kept until a batch is waited for.
    """

    def __init__(self, handler: Callable[[int, FrameType | None], Any]) -> None:
        self.handler = handler
        self.waiting = False
        self.error: RuntimeError | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        try:
            self.handler(number, frame)
        except RuntimeError as error:
            if self.waiting:
                raise
            self.error = error

    @staticmethod
    def take_over() -> None:
        """Put one around the present handler."""
        handler = child_signal_handler()
        if callable(handler) and not isinstance(handler, _Deaths):
            with suppress(ValueError):  # not in the main thread; there torch has no handler of its own either
                signal.signal(signal.SIGCHLD, _Deaths(handler))

    @staticmethod
    @contextmanager
    def told() -> Iterator[None]:
        """A context that a worker's death ends, with torch's error; also an earlier death, at once."""
        handler = child_signal_handler()
        if not isinstance(handler, _Deaths):
            yield
            return
        handler.waiting = True
        try:
            if handler.error is not None:
                error, handler.error = handler.error, None
                raise error
            yield
        finally:
            handler.waiting = False


# Seconds in which the end of a process can be seen after its connection was lost.
_SEEN_WITHIN = 2.0
# What the text of an error says -> what happened, and what to do.
_FAILURES = {
    r"shared memory.*Too many open files|Too many open files|items of ancdata": (
        "a loader's workers need more open files than the limit allows", "raise it, such as by `ulimit -n 65536`",
    ),
    r"shared memory|No space left": (
        "a loader's worker has no room for its batch in the shared memory{shm}",
        "enlarge it, such as by `docker run --shm-size=8g`",
    ),
    r"can't start new thread|Resource temporarily unavailable|Cannot allocate memory": (
        "the system refuses a loader's worker a process, a thread or memory", "raise the limits (`ulimit -u`, memory)",
    ),
    r"DataLoader worker \(pid|Pin memory thread exited|Connection|EOFError": (
        "a loader's worker is gone{ended}", "give the run more memory if that ran out",
    ),
}  # fmt: skip
# Errors that come from a worker's own code, but not from the data set's.
_NOT_OF_THE_DATA = re.compile(r"shared memory|RefusedError|can't start new thread|in pin memory thread")


def _failure(error: Exception, workers: Sequence[Any]) -> str | None:
    """What happened to one of the `workers`, and what to do; None for an error of the data set's code."""
    text = f"{type(error).__name__}: {_reason(error) if isinstance(error, OSError) else one_line(error)}"
    if ": Caught " in text and not _NOT_OF_THE_DATA.search(text):
        return None
    for pattern, (what, remedy) in _FAILURES.items():
        if re.search(pattern, text):
            return f"{what.format(shm=_shared_memory(), ended=_ended(workers) if '{ended}' in what else '')}; {remedy}"
    return None


def _ended(workers: Sequence[Any]) -> str:
    """` (process 123: SIGKILL)` for the workers that failed; empty if none did."""
    until = time.monotonic() + _SEEN_WITHIN
    while not (codes := {w.pid: w.exitcode for w in workers if w.exitcode}) and time.monotonic() < until:
        time.sleep(0.01)
    names = {pid: signal.Signals(-code).name if code < 0 else f"exit status {code}" for pid, code in codes.items()}
    return f" ({', '.join(f'process {pid}: {name}' for pid, name in names.items())})" if names else ""


def _shared_memory() -> str:
    """Where it is and how much it holds, as far as that is known."""
    with suppress(OSError):
        return f" (/dev/shm, {shutil.disk_usage('/dev/shm').total / 2**20:.0f} MiB)"
    return ""
