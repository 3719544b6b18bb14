"""Runs of the networks and data of `tests/reliability/small.py`, on a device."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mdistiller.engine.files.checkpoint import load_checkpoint
from mdistiller.engine.trainer import BaseTrainer

from ..reliability.alone import trainer_of, within
from ..reliability.runs import timeless

# Six full batches and one of eight images, three times. Small steps: large ones would magnify rounding errors.
STEADY = {
    "SOLVER.LR": 0.001, "SOLVER.BATCH_SIZE": 12, "SOLVER.EPOCHS": 3, "SOLVER.LR_DECAY_STAGES": [1, 2],
    "DISTILLER.STUDENT": "small",
}  # fmt: skip
STEPS = 7
NEVER, ALWAYS, AUTO = ({"SOLVER.CUDA_GRAPH": word} for word in ("never", "always", "auto"))


@dataclass
class Result:
    """What a run has written: the rows of metrics.csv without times, and the student's weights.

    Attributes:
        recorded: whether its last steps were replays of a CUDA graph.
    """

    rows: list[dict[str, str]]
    weights: dict[str, torch.Tensor]
    recorded: bool

    def distance(self, other: Result) -> float:
        """The largest difference of a weight."""
        assert self.weights.keys() == other.weights.keys()
        return max(float((w.double() - other.weights[k].double()).abs().max()) for k, w in self.weights.items())


def built(method: str, settings: Mapping[str, Any], device: torch.device) -> BaseTrainer:
    """The trainer of a run in the current folder, beside the `data`."""
    return trainer_of(method, STEADY | {"EXPERIMENT.DEVICE": str(device)} | dict(settings))


def trained(method: str, settings: Mapping[str, Any], device: torch.device, folder: Path) -> Result:
    """A whole run of `STEADY`: three epochs, each at another learning rate and with a short last batch.

    Args:
        folder: the run's own, beside the `data`.

    Raises:
        UserError: the run is refused.
    """
    with within(folder), contextlib.redirect_stdout(io.StringIO()):
        trainer = built(method, settings, device)
        trainer.train()
        weights = load_checkpoint(trainer.log_path / "student_latest")["model"]
        recorded = trainer.take_step.recording is not None
        return Result(timeless(trainer.log_path / "metrics.csv"), {k: v.cpu() for k, v in weights.items()}, recorded)


def losses(result: Result) -> list[float]:
    """Every loss of every epoch."""
    return [float(v) for row in result.rows for k, v in row.items() if k.startswith(("train_loss", "loss/")) and v]
