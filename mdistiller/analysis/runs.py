"""A run's folder, read back: its configuration and its figures epoch by epoch."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from yacs.config import CfgNode as CN

from ..engine.cfg import load_cfg
from ..errors import UserError


@dataclass(frozen=True)
class Run:
    """What a run's folder holds.

    Attributes:
        epochs: a dict of figures for each epoch, by the column names of metrics.csv.
    """

    folder: Path
    cfg: CN
    epochs: list[dict[str, float]]

    def column(self, name: str) -> list[float]:
        """One figure over the epochs."""
        return [row[name] for row in self.epochs]

    @property
    def last(self) -> float:
        """Top-1 of the last epoch, in percent."""
        return self.epochs[-1]["test_acc"]

    @property
    def best(self) -> float:
        """Top-1 of the best epoch, in percent; chosen on the images it is measured on, so it flatters."""
        return max(self.column("test_acc"))

    @property
    def seconds(self) -> float:
        """Wall time of training and validation."""
        return sum(self.column("epoch_seconds"))


def read_run(folder: str | Path) -> Run:
    """Read config.yaml and metrics.csv of a run.

    Raises:
        UserError: it is no run's folder, or no epoch has ended yet.
    """
    folder = Path(folder)
    try:
        with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
            epochs = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    except OSError:
        raise UserError(f"{folder} is no run's folder: it has no metrics.csv") from None
    except (ValueError, TypeError):
        raise UserError(f"{folder / 'metrics.csv'} holds something that is not a number") from None
    if not epochs or "test_acc" not in epochs[0]:
        raise UserError(f"{folder / 'metrics.csv'} holds no finished epoch")
    return Run(folder, load_cfg(folder / "config.yaml"), epochs)
