"""Where a run's figures go: worklog.txt, metrics.csv, TensorBoard and wandb behind one `log()`."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from yacs.config import CfgNode as CN

Metrics = Mapping[str, float]


class Writer(Protocol):
    """One destination of a run's figures."""

    def epoch(self, epoch: int, metrics: Metrics) -> None:
        """The figures of a whole epoch."""

    def step(self, step: int, scalars: Metrics) -> None:
        """Figures of the iterations up to `step`, counted from the start of the run."""

    def finish(self, summary: Metrics) -> None:
        """The run has ended; what it came to."""


class Worklog:
    """worklog.txt in the original's form: a block of `name: value` lines an epoch."""

    shown = ("train_acc", "train_loss", "test_acc", "test_acc_top5", "test_loss")

    def __init__(self, folder: Path, start_epoch: int) -> None:
        self.path = folder / "worklog.txt"
        if start_epoch == 1:
            self.path.unlink(missing_ok=True)

    def epoch(self, epoch: int, metrics: Metrics) -> None:
        # The original prints the learning rate with two decimals: 0.00 at 0.0005.
        lines = [f"epoch: {epoch}", f"lr: {metrics['lr']:g}"]
        lines += [f"{name}: {metrics[name]:.2f}" for name in self.shown]
        lines += [f"{name}: {value:.2f}" for name, value in metrics.items() if name.startswith("test_acc_head_")]
        rule = "-" * 25
        self._append("\n".join([rule, *lines, rule, ""]))

    def step(self, step: int, scalars: Metrics) -> None:
        pass

    def finish(self, summary: Metrics) -> None:
        self._append("".join(f"{name}\t{value:.2f}\n" for name, value in summary.items()))

    def _append(self, text: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)


class MetricsCsv:
    """metrics.csv: a row an epoch, a column a figure. Resuming drops the rows of epochs that will be run again."""

    def __init__(self, folder: Path, start_epoch: int) -> None:
        self.path = folder / "metrics.csv"
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            kept = [row for row in rows if int(row["epoch"]) < start_epoch]
            self._write(list(rows[0]) if rows else [], kept, "w")

    def epoch(self, epoch: int, metrics: Metrics) -> None:
        row = {"epoch": epoch, **{name: f"{value:.6g}" for name, value in metrics.items()}}
        self._write(list(row), [row], "a")

    def step(self, step: int, scalars: Metrics) -> None:
        pass

    def finish(self, summary: Metrics) -> None:
        pass

    def _write(self, columns: list[str], rows: list[Any], mode: str) -> None:
        with self.path.open(mode, newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            if columns and not file.tell():
                writer.writeheader()
            writer.writerows(rows)


class TensorBoard:
    """TensorBoard event files under train.events/."""

    def __init__(self, folder: Path, start_epoch: int) -> None:
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(folder / "train.events"))

    def epoch(self, epoch: int, metrics: Metrics) -> None:
        self._add(metrics, epoch)
        self.writer.flush()

    def step(self, step: int, scalars: Metrics) -> None:
        self._add({f"step/{name}": value for name, value in scalars.items()}, step)

    def finish(self, summary: Metrics) -> None:
        self.writer.close()

    def _add(self, scalars: Metrics, at: int) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, at)


class Wandb:
    """Weights & Biases: online where a key is at hand, else offline under the run's folder; it never asks."""

    def __init__(self, folder: Path, project: str, name: str, tags: list[str], config: dict[str, Any]) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or ("online" if _logged_in(wandb) else "offline")
        self.run = wandb.init(
            project=project, name=name, tags=[t[:64] for t in tags if t], config=config, dir=str(folder), mode=mode
        )

    def epoch(self, epoch: int, metrics: Metrics) -> None:
        self.run.log({"epoch": epoch, **metrics})

    def step(self, step: int, scalars: Metrics) -> None:
        pass

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
    """Hands figures to every writer. One that fails is dropped with one line: writers never stop training."""

    def __init__(self, makers: Mapping[str, Callable[[], Writer]]) -> None:
        self.writers: dict[str, Writer] = {}
        for name, make in makers.items():
            with self._guard(name):
                self.writers[name] = make()

    def epoch(self, epoch: int, metrics: Metrics) -> None:
        self._each(lambda writer: writer.epoch(epoch, metrics))

    def step(self, step: int, scalars: Metrics) -> None:
        self._each(lambda writer: writer.step(step, scalars))

    def finish(self, summary: Metrics) -> None:
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
            self.writers.pop(name, None)
            reason = " ".join(str(error).split())[:200]
            print(f"warning: {name} is off from here on ({type(error).__name__}: {reason})", file=sys.stderr)


def build_logger(folder: Path, name: str, cfg: CN, start_epoch: int) -> Logger:
    """The writers of a run in `folder`.

    Args:
        name: the run's name, PROJECT/NAME.
        start_epoch: the first epoch that will be logged.
    """
    makers: dict[str, Callable[[], Writer]] = {
        "worklog.txt": lambda: Worklog(folder, start_epoch),
        "metrics.csv": lambda: MetricsCsv(folder, start_epoch),
        "TensorBoard": lambda: TensorBoard(folder, start_epoch),
    }
    if cfg.LOG.WANDB:
        tags = cfg.EXPERIMENT.TAG.split(",")
        makers["wandb"] = lambda: Wandb(folder, cfg.EXPERIMENT.PROJECT, name, tags, cfg)
    return Logger(makers)
