"""SIGTERM and SIGINT as a request to stop at the end of the step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether the process has been asked to stop: `signal` is 0, or the number of the signal."""

    def __init__(self) -> None:
        self.signal = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Treat the first signal as a request to stop; a second one ends the process at once."""
        if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
            yield
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)


class Stopped(SystemExit):
    """Training stopped because of a signal; the exit status is the shell's for that signal, 128 + number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
