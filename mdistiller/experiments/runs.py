"""Read a run's folder: its configuration and the metrics of each epoch."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

from yacs.config import CfgNode as CN

from ..engine.cfg import load_cfg
from ..errors import UserError
from ..paths import expanded

# The columns of top-1: with labels, and without.
SCORES = ("test_acc", "test_agreement")


@dataclass(frozen=True)
class Run:
    """What a run's folder holds.

    Attributes:
        epochs: the metrics of each epoch, by the column names of metrics.csv; an empty cell is left out.
    """

    folder: Path
    cfg: CN
    epochs: list[dict[str, float]]

    @property
    def columns(self) -> list[str]:
        """The names of all metrics, in the file's order."""
        return list(dict.fromkeys(name for row in self.epochs for name in row))

    @property
    def losses(self) -> dict[str, str]:
        """The columns of the loss terms by their short names: {"ce": "loss/loss_ce"}."""
        return {c.removeprefix("loss/").removeprefix("loss_"): c for c in self.columns if c.startswith("loss/")}

    @property
    def heads(self) -> dict[str, str]:
        """The top-1 columns by head, the head behind `score` first; {"": "test_acc"} for a network with one head."""
        prefix = f"{self.score}_head_"
        heads = {c.removeprefix(prefix): c for c in self.columns if c.startswith(prefix)}
        return heads or {"": self.score}

    @property
    def score(self) -> str:
        """The column of the main head's top-1: "test_acc", or "test_agreement" of a run on images without labels."""
        return next((column for column in SCORES if column in self.columns), SCORES[0])

    def _accuracies(self) -> list[float]:
        if self.score != "test_acc":
            raise UserError(
                f"{self.folder} was trained on images without labels: it has no accuracy, but an agreement with its "
                "teacher in metrics.csv; name runs on labelled images"
            )
        return self.column("test_acc")

    @property
    def finished(self) -> bool:
        """Whether every epoch has been trained."""
        return self.epochs[-1]["epoch"] >= self.cfg.SOLVER.EPOCHS

    def column(self, name: str) -> list[float]:
        """One metric over the epochs; NaN where an epoch lacks it."""
        return [row.get(name, nan) for row in self.epochs]

    @property
    def last(self) -> float:
        """Top-1 of the last epoch, in percent."""
        return self._accuracies()[-1]

    @property
    def best(self) -> float:
        """Top-1 of the best epoch, in percent; optimistic, as the epoch is chosen on the images it is measured on."""
        return max(self._accuracies())

    @property
    def seconds(self) -> float:
        """Wall time of training and validation."""
        return sum(self.column("epoch_seconds"))

    @property
    def environment(self) -> dict[str, Any]:
        """environment.json: command, versions, hardware; empty where it cannot be read."""
        try:
            return dict(json.loads((self.folder / "environment.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            return {}


def read_run(folder: str | Path) -> Run:
    """Read config.yaml and metrics.csv of a run.

    Raises:
        UserError: it is not a run's folder, or no epoch has ended yet.
    """
    folder = Path(folder)
    epochs = read_epochs(folder)
    return Run(folder, load_cfg(folder / "config.yaml"), epochs)


def read_epochs(folder: Path) -> list[dict[str, float]]:
    """The metrics of each epoch of a run, from metrics.csv; see `Run.epochs` and `read_run`.

    Those of stages before training, numbered up to 0, are left out: they have no accuracy.
    """
    try:
        with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        epochs = [{name: float(value) for name, value in row.items() if value != ""} for row in rows]
    except OSError:
        raise UserError(f"{folder} is no run's folder: it has no metrics.csv") from None
    except (ValueError, TypeError, csv.Error):
        raise UserError(f"{folder / 'metrics.csv'} holds something that is not a number") from None
    epochs = [row for row in epochs if row.get("epoch", 1) >= 1]
    scored = next((column for column in SCORES if epochs and column in epochs[0]), SCORES[0])
    if not epochs or not all({"epoch", scored} <= row.keys() for row in epochs):
        raise UserError(f"{folder / 'metrics.csv'} holds no finished epoch")
    return epochs


def read_runs(arguments: Sequence[str]) -> dict[str, Run]:
    """Runs by their labels, from FOLDER or LABEL=FOLDER as a command line gives them.

    A folder without a label is named by the comma-separated parts of its name that not all such folders share.

    Raises:
        UserError: one is not a run's folder, or two have the same label.
    """
    given = [_labelled(argument) for argument in arguments]
    short = iter(_short_names([os.path.basename(os.path.abspath(folder)) for label, folder in given if not label]))
    runs: dict[str, Run] = {}
    for label, folder in given:
        label = label or next(short)
        if label in runs:
            raise UserError(f"two runs are called {label!r}; tell them apart by LABEL=FOLDER")
        runs[label] = read_run(folder)
    return runs


def _labelled(argument: str) -> tuple[str, str]:
    """The label, "" if there is none, and the folder."""
    if "=" not in argument or argument.startswith("~") or os.path.exists(argument):
        return "", expanded(argument)
    label, folder = argument.split("=", 1)
    return label, expanded(folder)


def _short_names(names: Sequence[str]) -> list[str]:
    """The names without the parts that all of them have."""
    parts = [name.split(",") for name in names]
    shared = set.intersection(*map(set, parts)) if len(parts) > 1 else set()
    return [",".join(p for p in of_one if p not in shared) or name for of_one, name in zip(parts, names)]
