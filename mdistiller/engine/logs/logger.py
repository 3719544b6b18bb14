"""Where a run's figures go: worklog.txt, metrics.csv, TensorBoard and wandb behind one `Logger`."""

from __future__ import annotations

import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import yaml
from yacs.config import CfgNode as CN

from .log_files import Metrics, MetricsCsv, Worklog


class Writer(Protocol):
    """One destination of a run's figures. Where it has a true `tries_again`, it is kept though it failed."""

    def epoch(self, epoch: int, metrics: Metrics) -> None:
        """The figures of a whole epoch."""

    def step(self, step: int, scalars: Metrics) -> None:
        """Figures of the iterations up to `step`, counted from the start of the run."""

    def finish(self, summary: Metrics) -> None:
        """The run has ended; what it came to."""


class TensorBoard:
    """TensorBoard event files under train.events/: figures of epochs by epoch, and in steps/ those of steps by step.

    Two folders, because resuming hides what will be run again by its number: from `start_epoch`, and past `start_step`.
    """

    # tensorboardX's SummaryWriter writes in a thread; where that cannot write, it dies and training waits for ever.

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
    """One event file, written by the thread that calls."""

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
        # TensorBoard hides what earlier files have from this step on.
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

    def __del__(self) -> None:  # a run that ends by an error
        with suppress(OSError, AttributeError):
            self._writer.close()

    def _add(self, **content: Any) -> None:
        event = self._event(wall_time=time.time(), **content)
        self._guarded(lambda: self._writer.write(event.SerializeToString()))

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except OSError:
            # Else Python tries once more to write at the end, and complains.
            with suppress(OSError):
                self._writer.close()
            raise


class Wandb:
    """Weights & Biases: online where a key is at hand and the service answers, else offline under the run's folder.

    It never asks, and waits for the network half a minute to start and to end, unless WANDB_INIT_TIMEOUT and
    WANDB_FINISH_TIMEOUT say otherwise. A resumed run goes on in the same wandb run.
    """

    def __init__(
        self, folder: Path, project: str, name: str, tags: list[str], config: dict[str, Any], resume: bool = False
    ) -> None:
        for key, value in {"SILENT": "true", "INIT_TIMEOUT": "30", "FINISH_TIMEOUT": "30"}.items():
            os.environ.setdefault(f"WANDB_{key}", value)
        import wandb

        self._id_file = folder / "wandb" / "run_id"
        settings: dict[str, Any] = {
            "project": project, "name": name, "tags": [t[:64] for t in tags if t], "config": config,
            "dir": str(folder), "id": self._id(resume), "resume": "allow",
        }  # fmt: skip
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if _logged_in(wandb) else "offline")
        try:
            self.run = wandb.init(**settings, mode=mode)
        except Exception as error:
            if mode != "online":
                raise
            _warn(f"wandb is offline, under {folder / 'wandb'} ({_reason(error)})")
            wandb.teardown()  # its service holds on to the run that did not begin
            self.run = wandb.init(**settings, mode="offline")
        # Its own counter of calls has no meaning over a resumed run.
        self.run.define_metric("*", step_metric="epoch")
        self.run.define_metric("test_acc", step_metric="epoch", summary="last,max")
        self.run.define_metric("step/*", step_metric="step/number")

    def _id(self, resume: bool) -> str:
        """The wandb run's name for itself, kept in the run's folder."""
        with suppress(OSError):
            known = self._id_file.read_text(encoding="utf-8").strip()
            if resume and known.isalnum():
                return known
        new = secrets.token_hex(8)
        self._id_file.parent.mkdir(parents=True, exist_ok=True)
        self._id_file.write_text(new, encoding="utf-8")
        return new

    def epoch(self, epoch: int, metrics: Metrics) -> None:
        self.run.log({"epoch": epoch, **metrics})

    def step(self, step: int, scalars: Metrics) -> None:
        self.run.log({"step/number": step, **{f"step/{name}": value for name, value in scalars.items()}})

    def finish(self, summary: Metrics) -> None:
        self.run.summary.update(dict(summary))
        self.run.finish()


def _logged_in(wandb: Any) -> bool:
    """Whether there is a key for wandb; asks neither the user nor the network."""
    try:
        return wandb.login(prompt=False, verify=False)
    except TypeError:  # a wandb from before `prompt`
        return bool(wandb.api.api_key)


class Logger:
    """Hands figures to every writer. One that fails is dropped with one line: writers never stop training.

    The run's own files are kept, and try again the next time.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Writer]]) -> None:
        self.writers: dict[str, Writer] = {}
        self._told: set[str] = set()
        for name, make in makers.items():
            with self._guard(name):
                self.writers[name] = make()

    def epoch(self, epoch: int, metrics: Metrics) -> None:
        """The figures of a whole epoch."""
        self._each(lambda writer: writer.epoch(epoch, metrics))

    def step(self, step: int, scalars: Metrics) -> None:
        """Figures of the iterations up to `step`, counted from the start of the run."""
        self._each(lambda writer: writer.step(step, scalars))

    def finish(self, summary: Metrics) -> None:
        """The run has ended; what it came to."""
        self._each(lambda writer: writer.finish(summary))

    def _each(self, call: Callable[[Writer], None]) -> None:
        for name, writer in list(self.writers.items()):
            with self._guard(name):
                call(writer)

    @contextmanager
    def _guard(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a network, a disk or a service comes up with
            keep = getattr(self.writers.get(name), "tries_again", False)
            if not keep:
                self.writers.pop(name, None)
            if name not in self._told:
                fate = "cannot be written now, and is tried again each epoch" if keep else "is off from here on"
                _warn(f"{name} {fate} ({_reason(error)})")
            self._told.add(name)


def _warn(text: str) -> None:
    with suppress(OSError, ValueError):  # stderr may be gone too
        print(f"warning: {text}", file=sys.stderr, flush=True)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def build_logger(folder: Path, name: str, cfg: CN, start_epoch: int, start_step: int = 0) -> Logger:
    """The writers of a run in `folder`. What they hold of epochs and steps that will be run again is dropped.

    Args:
        name: the run's name, PROJECT/NAME.
        start_epoch: the first epoch that will be logged.
        start_step: how many steps of the run are done; 0 with `start_epoch` 1 is a new run.
    """
    makers: dict[str, Callable[[], Writer]] = {
        "worklog.txt": lambda: Worklog(folder, start_epoch),
        "metrics.csv": lambda: MetricsCsv(folder, start_epoch),
        "TensorBoard": lambda: TensorBoard(folder, start_epoch, start_step),
    }
    if cfg.LOG.WANDB:
        tags, config = cfg.EXPERIMENT.TAG.split(","), yaml.safe_load(cfg.dump())
        resume = start_epoch > 1 or start_step > 0
        makers["wandb"] = lambda: Wandb(folder, cfg.EXPERIMENT.PROJECT, name, tags, config, resume)
    return Logger(makers)
