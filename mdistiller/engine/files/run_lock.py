"""One run in one folder at a time."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import UserError
from ...system import in_forked_child, lock, process_start
from ...user_files import discard

NAME = ".run_lock"
_held: set[BinaryIO] = set()


def _let_go() -> None:
    # A forked worker (of a DataLoader) inherits the open file, and would hold the lock after its parent was killed.
    for file in _held:
        file.close()
    _held.clear()


in_forked_child(_let_go)


class RunInUseError(UserError):
    """Another run uses the folder; the message names its host, process, start and command."""


@contextmanager
def run_lock(folder: str | Path) -> Iterator[None]:
    """Lock the run's `folder` for this process; a missing folder is created.

    The operating system holds the lock: it ends with the process, however that ends, and worker processes do not
    inherit it. On a network file system it works between hosts if the file system supports locks. On a file system
    without locks the content of the lock file decides: a run on another host counts as alive, a run on this host while
    its process exists.

    Raises:
        RunInUseError: another run uses the folder.
        UserError: the folder cannot be written to.
    """
    path = Path(folder) / NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _acquire(path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write to {folder} ({reason}); set LOG.PREFIX to another folder") from None
    _held.add(file)
    try:
        yield
    finally:
        if file in _held:  # not in a forked child
            _held.remove(file)
            discard(path)
            with suppress(OSError):
                file.close()


def _acquire(path: Path) -> BinaryIO:
    while True:
        file = path.open("r+b" if path.exists() else "a+b")
        try:
            _lock(file, path)
            # The previous run may have deleted the file between our opening and locking it.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                file.write(json.dumps(_own_facts()).encode())
                file.flush()
                return file
        except BaseException:
            with suppress(OSError):  # what could not be written before is tried again here
                file.close()
            raise
        file.close()


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        lock(file)
    except BlockingIOError:
        raise _in_use(path) from None
    except OSError:  # a file system without locks
        facts = _facts(path)
        if facts and _alive(facts):
            raise _in_use(path) from None


def _own_facts() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_start": process_start(os.getpid()),
        "since": datetime.now().astimezone().isoformat(" ", "seconds"),
        "command": " ".join(sys.argv),
    }


def _facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_bytes())
    except (OSError, ValueError):  # it is being written
        return {}
    return facts if isinstance(facts, dict) and facts.keys() >= _own_facts().keys() else {}


def _alive(facts: dict[str, Any]) -> bool:
    if facts["host"] != socket.gethostname():
        return True
    # The system reuses process ids.
    return process_start(facts["pid"]) == facts["process_start"]


def _in_use(path: Path) -> RunInUseError:
    facts = _facts(path)
    who = "process {pid} on host {host}, started {since} ({command})".format(**facts) if facts else "another process"
    return RunInUseError(
        f"{path.parent} is in use by {who}; wait for it or stop it, or give this run another EXPERIMENT.NAME"
    )
