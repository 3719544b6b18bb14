"""Processes with a time limit, of which nothing is left when it is over."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# Seconds that processes have to end by themselves, before they are killed.
GRACE = 3.0


@dataclass
class Outcome:
    """How a stage ended.

    Attributes:
        status: "done", "failed", "out of time", "interrupted" or "skipped".
        seconds: its wall time.
        limit: the seconds that it had.
        note: in words, why it did not end well; empty otherwise.
    """

    name: str
    status: str
    seconds: float = 0.0
    limit: float = 0.0
    note: str = ""


def run_stage(
    name: str, command: Sequence[str], limit: float, output: Path, environment: Mapping[str, str], cwd: Path,
    grace: float | None = None,
) -> Outcome:
    """Run a stage for at most `limit` seconds, and `grace` (GRACE) to end itself; `output` keeps what it prints.

    If this raises, as a signal's handler may, the stage has been ended, too.
    """
    start = time.monotonic()
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=cwd, env={**os.environ, **environment},
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            end_family(process, GRACE if grace is None else grace)
    seconds = time.monotonic() - start
    if status == 0:
        return Outcome(name, "done", seconds, limit)
    if status is None:
        return Outcome(name, "out of time", seconds, limit, f"ended at {limit:.0f} s; it holds what was done")
    how = f"exit status {status}" if status > 0 else f"signal {-status}"
    return Outcome(name, "failed", seconds, limit, f"{how}: {last_line(output) or 'it printed nothing'}")


def end_family(process: subprocess.Popen[bytes], grace: float) -> None:
    """End a session's first process and all below it, also what it started in sessions of their own."""
    family = [] if process.poll() is not None else [*below(process.pid), process.pid]
    _signal(family, signal.SIGTERM)
    until = time.monotonic() + grace
    while any(map(_runs, family)) and time.monotonic() < until:
        process.poll()
        time.sleep(0.05)
    _signal([pid for pid in family if _runs(pid)], signal.SIGKILL)
    # Those whose parents had ended before are not below it any more, but mostly in its session.
    with suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def below(pid: int) -> list[int]:
    """The processes that `pid` has started, and those that they have, as Linux knows them; none on other systems."""
    parents = {int(path.name): _stat(int(path.name)) for path in Path("/proc").glob("[0-9]*")}
    found: list[int] = []
    new = [pid]
    while new:
        new = [child for child, stat in parents.items() if stat and int(stat[1]) in new]
        found += new
    return found


def _stat(pid: int) -> list[str]:
    """State, parent and so on of a process, from Linux; empty if there is none."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()
    return []


def _runs(pid: int) -> bool:
    """Whether a process has not ended yet; one whose parent has not asked for its end is a zombie."""
    return (_stat(pid) or "Z")[0] != "Z"


def _signal(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        with suppress(OSError):
            os.kill(pid, number)


def last_line(path: Path) -> str:
    """The last line of a text file that is not empty, cut to 300 characters."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")
