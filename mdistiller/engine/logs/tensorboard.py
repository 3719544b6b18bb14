"""TensorBoard event files."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .log_files import Metrics


class TensorBoard:
    """TensorBoard event files: the metrics of epochs in train.events/, those of steps in train.events/steps/.

    Two folders, because resuming hides old entries by their number: in one the epochs from `start_epoch` on, in the
    other the steps after `start_step`.
    """

    # Not tensorboardX's SummaryWriter: it writes in a thread that dies if it cannot write; training then waits forever.

    def __init__(self, folder: Path, start_epoch: int, start_step: int = 0) -> None:
        self.epochs = _EventFile(folder / "train.events", start_epoch)
        self.steps = _EventFile(folder / "train.events" / "steps", start_step + 1)

    def epoch(self, epoch: int, metrics: Metrics) -> None:
        self.epochs.write(epoch, metrics)
        self.epochs.flush()
        self.steps.flush()

    def step(self, step: int, scalars: Metrics) -> None:
        self.steps.write(step, {f"step/{name}": value for name, value in scalars.items()})

    def finish(self, summary: Metrics) -> None:
        self.epochs.close()
        self.steps.close()


class _EventFile:
    """One event file, written in the calling thread."""

    flush_seconds = 60.0

    def __init__(self, folder: Path, start: int) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter
        from tensorboardX.summary import scalar

        self._event, self._scalar = Event, scalar
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._writer = RecordWriter(str(folder / name))
        self._add(file_version="brain.Event:2")
        # TensorBoard hides the entries of earlier files from this step on.
        self._add(step=start, session_log=SessionLog(status=SessionLog.START))
        self.flush()

    def write(self, step: int, scalars: Metrics) -> None:
        for name, value in scalars.items():
            self._add(step=step, summary=self._scalar(name, value))
        if time.monotonic() > self._flush_at:
            self.flush()

    def flush(self) -> None:
        self._guarded(self._writer.flush)
        self._flush_at = time.monotonic() + self.flush_seconds

    def close(self) -> None:
        self._writer.close()

    def __del__(self) -> None:  # for a run that ends with an error
        with suppress(OSError, AttributeError):
            self._writer.close()

    def _add(self, **content: Any) -> None:
        event = self._event(wall_time=time.time(), **content)
        self._guarded(lambda: self._writer.write(event.SerializeToString()))

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except OSError:
            # Otherwise Python tries to write again at exit, and prints an error.
            with suppress(OSError):
                self._writer.close()
            raise
