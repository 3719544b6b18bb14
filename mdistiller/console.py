"""What is said to the user: the log, one-line errors, and output that survives a closed terminal.

The package logs through `logging.getLogger("mdistiller")`, and the progress of a run through its child
"mdistiller.progress". A tool prints both on the terminal. Whoever imports the package sees warnings on stderr, as the
module `logging` prints them, and silences or redirects the log as that of any library.
"""

from __future__ import annotations

import codecs
import errno
import io
import logging
import os
import re
import select
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from .errors import UserError
from .system import ignore_hangup

LOG = logging.getLogger("mdistiller")
PROGRESS = logging.getLogger("mdistiller.progress")

# The reader of a pipe has exited, the terminal was closed, the file was closed.
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF)


def one_line(text: object, limit: int | None = None) -> str:
    """`text` on a single line, cut to `limit` characters."""
    return " ".join(str(text).split())[:limit]


def reason(error: BaseException) -> str:
    """An exception in one line of at most about 200 characters: its type, then its message."""
    return f"{type(error).__name__}: {one_line(error, 200)}"


def warn(text: str) -> None:
    """Log `text`, as one line, at level WARNING; a tool prints `warning: text` on stderr."""
    LOG.warning("%s", one_line(text))


def note(text: str) -> None:
    """Log `text`, as one line, at level INFO; a tool prints `note: text` on stderr."""
    LOG.info("%s", one_line(text))


def progress(line: str) -> None:
    """Log a line about how a run is getting on, at level INFO; a tool prints it on stdout."""
    PROGRESS.info("%s", line)


class Terminal(logging.Handler):
    """Prints the log as the tools do: progress on stdout, other lines on stderr, `warning: ...` and `note: ...`."""

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        plain = record.name == PROGRESS.name
        kind = "" if plain else "warning: " if record.levelno >= logging.WARNING else "note: "
        with suppress(OSError, ValueError):  # the stream may be closed; a lost line must not stop the run
            print(f"{kind}{line}", file=sys.stdout if plain else sys.stderr, flush=True)


def log_to_terminal() -> None:
    """Print the package's log on the terminal, and only there. A second call changes nothing."""
    if not any(isinstance(handler, Terminal) for handler in LOG.handlers):
        LOG.addHandler(Terminal())
        LOG.propagate = False  # a library may give the root logger a handler, which would print every line again
        if LOG.level == logging.NOTSET:
            LOG.setLevel(logging.INFO)


def _escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    """Bytes of a file's name that Python could not decode, as they are; other characters as escapes, such as \\xfc."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.backslashreplace_errors(error)


codecs.register_error("mdistiller.escaped", _escaped)


def print_in_any_encoding() -> None:
    """Let no output fail because the terminal's encoding lacks a character, as in the locale C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape", "backslashreplace"):
            stream.reconfigure(errors="mdistiller.escaped")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a UserError into one line on stderr, `error: ...`, and exit status 2.

    So does an error that says that memory ran out. Any other exception is a fault, of this package or of a user's own
    method, and its traceback is needed. So whatever reads a file turns the errors of the disk and of the content into
    UserErrors itself; see `user_files`.

    Its output may be in any encoding.
    """
    print_in_any_encoding()
    try:
        yield
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except Exception as error:
        line = out_of_memory(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2) from None


# How it is said by the CPU's allocator of torch, by CUDA, by its libraries, and by the system.
_NO_MEMORY = re.compile(
    r"\b(?:CUDA|HIP|XPU|MPS)\b.*\bout of memory|DefaultCPUAllocator: |Cannot allocate memory|STATUS_ALLOC_FAILED"
)
_SMALLER = (
    "take a smaller batch (SOLVER.BATCH_SIZE, DATASET.TEST.BATCH_SIZE, a tool's --batch-size), split it "
    "(SOLVER.ACCUMULATE), or let fewer processes share the device (--jobs of `table`)"
)


def out_of_memory(error: BaseException | None) -> str | None:
    """What is said, in one line, if `error`, or what caused it, is that the device or the machine has no memory left.

    It names the line of code that asked for it, but for lines of torch. None for any other error.
    """
    while error is not None and not _is_of_memory(error):
        error = error.__cause__
    if error is None:
        return None
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "torch" not in Path(f.filename).parts]
    place = f" in {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""
    # torch says where in its own source it was, then the amount, then much about its allocator.
    said = str(error).strip().partition("\n")[0].rpartition("DefaultCPUAllocator: ")[2]
    what = re.split(r"\. (?:Process|Including|Of the allocated|Error code) ", said)[0]
    return f"out of memory{place} ({one_line(what, 200) or type(error).__name__}); {_SMALLER}"


def _is_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, (RuntimeError, OSError)) and _NO_MEMORY.search(str(error)) is not None


@contextmanager
def tool() -> Iterator[None]:
    """Around a tool's main(), also as a decorator: `log_to_terminal`, `one_line_errors`, `ended_by_its_reader`."""
    log_to_terminal()
    with one_line_errors(), ended_by_its_reader():
        yield


@contextmanager
def ended_by_its_reader() -> Iterator[None]:
    """Exit without a word if the reader of stdout, such as `head`, has gone; with the status of a shell's SIGPIPE."""
    try:
        yield
        sys.stdout.flush()  # here, not when Python exits, where the error could not be caught
    except BrokenPipeError:
        if not _unread():
            raise  # another pipe's
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes when it exits
        raise SystemExit(128 + 13) from None


def _unread() -> bool:
    """Whether stdout is a pipe that nobody reads any more."""
    with suppress(OSError, ValueError, AttributeError):  # no file at all, or a system without poll
        ends = select.poll()
        ends.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in ends.poll(0))
    return False


def outlive_terminal() -> None:
    """Keep this process running when its terminal is closed or the reader of its output exits.

    Its further output to the broken stream is lost; the other one of stdout and stderr gets one warning line. Call it
    in a tool's main(), before the first output.
    """
    ignore_hangup()
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


def network_name(network: Any) -> str:
    """What messages call a network: the name by which it was built ("timm/resnet18") if it holds one; or its class."""
    name = getattr(network, "name", None)
    return name if isinstance(name, str) and name else type(network).__name__
