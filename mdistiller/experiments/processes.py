"""Run processes to their end and keep their output. Imports no torch, so that a Ray worker starts quickly."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

from ..paths import CLONE


@dataclass(frozen=True)
class Task:
    """A process to run: command line, working folder, additional environment variables, and the file for its output."""

    command: list[str]
    cwd: str
    environment: dict[str, str]
    log: Path


def package_environment() -> dict[str, str]:
    """The environment variables with which `python -m mdistiller` runs this copy of the package.

    An installed package needs nothing. A clone that is not installed must be on PYTHONPATH.
    """
    if CLONE is None:
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(CLONE), os.environ.get("PYTHONPATH"))))}


class Processes:
    """The processes that are running, so that all of them can be ended."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._ended = False

    def run(self, task: Task, environment: dict[str, str] | None = None) -> str:
        """Run the task to its end; its output is appended to its log.

        Returns:
            An empty string on success, else the last line of its output or, without output, its exit status; or the
            signal that ended it.
        """
        task.log.parent.mkdir(parents=True, exist_ok=True)
        with task.log.open("ab") as log:
            start = log.tell()
            with self._lock:
                if self._ended:
                    return "interrupted"
                process = subprocess.Popen(
                    task.command, cwd=task.cwd, env=os.environ | task.environment | (environment or {}),
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                )  # fmt: skip
                self._running.add(process)
            try:
                status = process.wait()
            except BaseException:  # Ray cancels a task by an exception
                process.terminate()
                raise
            finally:
                self._running.discard(process)
        lines = task.log.read_bytes()[start:].decode(errors="replace").split("\n")
        if status < 0:  # the last line is not the reason
            return ended_by(-status)
        return "" if status == 0 else next((line for line in reversed(lines) if line.strip()), f"exit status {status}")

    def end(self) -> None:
        """End the running processes, and start no more."""
        with self._lock:
            self._ended = True
            for process in self._running:
                process.terminate()


def ended_by(number: int) -> str:
    """What is said of a process that the signal `number` ended."""
    name = {one.value: one.name for one in signal.Signals}.get(number, f"signal {number}")
    memory = ", as the system does when memory runs out; try fewer runs at a time (--jobs)"
    return f"ended by {name}{memory if name == 'SIGKILL' else ''}"


def run_task(task: Task) -> str:
    """`Processes.run` for a single task."""
    return Processes().run(task)
