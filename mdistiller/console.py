"""Terminal output: one-line notes, warnings and errors, and output that survives a closed terminal."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

# The reader of a pipe has exited, the terminal was closed, the file was closed.
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF)


def one_line(text: object, limit: int | None = None) -> str:
    """`text` on a single line, cut to `limit` characters."""
    return " ".join(str(text).split())[:limit]


def reason(error: BaseException) -> str:
    """An exception in one line of at most about 200 characters: its type, then its message."""
    return f"{type(error).__name__}: {one_line(error, 200)}"


def warn(text: str) -> None:
    """Print `warning: text` to stderr, as one line."""
    _print_line(f"warning: {one_line(text)}")


def note(text: str) -> None:
    """Print `note: text` to stderr, as one line."""
    _print_line(f"note: {one_line(text)}")


def _print_line(line: str) -> None:
    with suppress(OSError, ValueError):  # stderr may be closed; a warning must not stop the run
        print(line, file=sys.stderr, flush=True)


@contextmanager
def one_line_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turn an exception of these `kinds` into one line on stderr, `error: ...`, and exit status 2.

    The default, ValueError and OSError, is for reading the input and building the run. Around training use UserError
    alone: any other exception there is a bug, whose traceback is needed.
    """
    caught = kinds or (ValueError, OSError)
    try:
        yield
    except caught as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def outlive_terminal() -> None:
    """Keep this process running when its terminal is closed or the reader of its output exits.

    Its further output to the broken stream is lost; the other one of stdout and stderr gets one warning line. Call it
    in a tool's main(), before the first output.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for name, other in (("stdout", "stderr"), ("stderr", "stdout")):
        if not isinstance(getattr(sys, name), _Outliving):
            # A stream that was closed before Python started (`>&-`) is None there.
            stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, _Outliving(stream, name, other))


class _Outliving:
    """A text stream whose write() and flush() never fail."""

    def __init__(self, stream: TextIO, name: str, other: str) -> None:
        self._stream, self._name, self._other = stream, name, other
        self._warned = False

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: written to after close()
            self._lost(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._lost(error)

    def _lost(self, error: Exception) -> None:
        if isinstance(error, OSError) and error.errno in _GONE:
            # The stream will not come back: discard also the buffered text and what libraries write to it.
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
        if not self._warned:
            self._warned = True
            print(f"warning: {self._name} is lost ({error}); going on", file=getattr(sys, self._other), flush=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
