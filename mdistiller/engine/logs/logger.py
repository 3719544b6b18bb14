"""Logs a run's metrics to worklog.txt, metrics.csv, TensorBoard and wandb through one `Logger`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import yaml
from yacs.config import CfgNode as CN

from ...console import reason, warn
from .log_files import Metrics, MetricsCsv, Worklog
from .tensorboard import TensorBoard
from .wandb_run import Wandb


class Writer(Protocol):
    """One destination of a run's metrics. A writer with `tries_again = True` is kept after a failure."""

    def epoch(self, epoch: int, metrics: Metrics) -> None:
        """Log the metrics of an epoch."""

    def step(self, step: int, scalars: Metrics) -> None:
        """Log the metrics of the latest steps, up to `step`, counted from the start of the run."""

    def finish(self, summary: Metrics) -> None:
        """The run has ended; `summary` holds its results."""


class Logger:
    """Passes metrics to every writer. A writer that fails is dropped with one warning: writers never stop training.

    The writers of the run's own files are kept, and try again at the next call.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Writer]]) -> None:
        self.writers: dict[str, Writer] = {}
        self._warned: set[str] = set()
        for name, make in makers.items():
            with self._guard(name):
                self.writers[name] = make()

    def epoch(self, epoch: int, metrics: Metrics) -> None:
        """Log the metrics of an epoch."""
        self._each(lambda writer: writer.epoch(epoch, metrics))

    def step(self, step: int, scalars: Metrics) -> None:
        """Log the metrics of the latest steps, up to `step`, counted from the start of the run."""
        self._each(lambda writer: writer.step(step, scalars))

    def finish(self, summary: Metrics) -> None:
        """The run has ended; `summary` holds its results."""
        self._each(lambda writer: writer.finish(summary))

    def _each(self, call: Callable[[Writer], None]) -> None:
        for name, writer in list(self.writers.items()):
            with self._guard(name):
                call(writer)

    @contextmanager
    def _guard(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a network, a disk or a service may raise anything
            keep = getattr(self.writers.get(name), "tries_again", False)
            if not keep:
                self.writers.pop(name, None)
            if name not in self._warned:
                fate = "cannot be written now, and is tried again each epoch" if keep else "is off from here on"
                warn(f"{name} {fate} ({reason(error)})")
            self._warned.add(name)


def build_logger(
    folder: Path, name: str, cfg: CN, start_epoch: int, start_step: int = 0, resumed: bool | None = None
) -> Logger:
    """The logger of a run in `folder`. Entries of epochs and steps that will run again are dropped.

    Args:
        name: the run's name, PROJECT/NAME.
        start_epoch: the first epoch that will be logged; 0 or less within stages before training.
        start_step: number of steps of the run that are done, counted from epoch 1.
        resumed: whether the run has begun before; None: 0 steps with `start_epoch` 1 is a new one.
    """
    makers: dict[str, Callable[[], Writer]] = {
        "worklog.txt": lambda: Worklog(folder, start_epoch),
        "metrics.csv": lambda: MetricsCsv(folder, start_epoch),
        "TensorBoard": lambda: TensorBoard(folder, start_epoch, start_step),
    }
    if cfg.LOG.WANDB:
        tags, config = cfg.EXPERIMENT.TAG.split(","), yaml.safe_load(cfg.dump())
        resume = resumed if resumed is not None else start_epoch > 1 or start_step > 0
        makers["wandb"] = lambda: Wandb(folder, cfg.EXPERIMENT.PROJECT, name, tags, config, resume)
    return Logger(makers)
