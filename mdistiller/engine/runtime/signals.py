"""SIGTERM and SIGINT as a request to stop at the end of the step."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from ...system import in_forked_child

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A second signal this soon after the first is the same one: `timeout` signals its child and then the child's group.
ONE_REQUEST = 0.1  # seconds
_END = b"\0"  # of what the reader reads; no signal has this number
# The file descriptors that signals are written to, of the requests that are listening.
_listening: set[int] = set()


def _leave_to_parent() -> None:
    """In a forked child, such as a loader's worker: its signals are not the parent's, and Ctrl-C is for the parent."""
    if _listening:
        _listening.clear()
        with suppress(ValueError):  # not the main thread
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)


in_forked_child(_leave_to_parent)


class StopRequest:
    """Whether the process has been asked to stop: `signal` is 0, or the number of the first signal.

    Python runs a signal's handler between two operations of the main thread. A backward pass is one operation, of
    seconds, in which two signals would count as one. So a thread reads the signals, from a socket that they are
    written to as they arrive.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._since = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Treat the first signal as a request to stop; a second one ends the process at once.

        Not under torchrun, which passes on what it receives: a rank receives a signal to the whole job twice, and
        another one when a rank has stopped before it. torchrun kills what has not stopped after its own grace period.
        """
        if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
            yield
            return
        read, write = socket.socketpair()  # Windows has no pipe that does not block
        write.setblocking(False)
        before = {number: signal.signal(number, _do_nothing) for number in SIGNALS}
        wakeup = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
        _listening.add(write.fileno())
        reader = threading.Thread(target=self._read, args=(read,), daemon=True)
        reader.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            _listening.discard(write.fileno())
            write.send(_END)  # closing it would not end the reader: forked workers hold it, too
            reader.join()
            write.close()
            read.close()

    def _read(self, signals: socket.socket) -> None:
        while (received := signals.recv(1)) != _END:
            number = received[0]
            if number not in SIGNALS:
                continue
            if not self.signal:
                self.signal, self._since = number, time.monotonic()
            elif time.monotonic() - self._since > ONE_REQUEST and not _under_torchrun():
                ctypes.pythonapi.PyOS_setsig(number, None)  # SIG_DFL; signal.signal() is for the main thread alone
                os.kill(os.getpid(), number)


def _under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """A handler of Python's, so that the signal is written to the socket."""


class Stopped(SystemExit):
    """Training stopped because of a signal; the exit status is the shell's for that signal, 128 + number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
