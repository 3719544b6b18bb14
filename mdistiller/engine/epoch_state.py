"""The progress of an epoch: its step, its meters, its clock."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..distributed.ranks import Ranks
from .meters import Meters


class Clock:
    """Seconds of one epoch: waiting for data, training, and in total. Includes the time before an interruption."""

    def __init__(self, data: float = 0.0, training: float = 0.0) -> None:
        self.data = data
        self.before = training
        self.start = time.perf_counter()
        self.training = training

    def around(self, batches: Iterable[Any]) -> Iterator[Any]:
        """`batches`, with the time to each `next()` counted as data time."""
        iterator = iter(batches)
        while True:
            before = time.perf_counter()
            batch = next(iterator, None)
            self.data += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    def elapsed(self) -> float:
        """Seconds up to now."""
        return self.before + time.perf_counter() - self.start

    def go_on(self) -> None:
        """Count from now on: a restored clock stood still up to here."""
        self.start = time.perf_counter()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """A context whose time does not count."""
        before = time.perf_counter()
        yield
        self.start += time.perf_counter() - before

    def stop_training(self) -> None:
        """End the training time; validation follows."""
        self.training = self.elapsed()

    def state_dict(self) -> dict[str, float]:
        """The arguments of a `Clock` that continues from here."""
        return {"data": self.data, "training": self.elapsed()}

    def metrics(self, steps: int, images: int) -> dict[str, float]:
        """Seconds per step, and of these for data; images per second of training; seconds of the epoch so far."""
        return {
            "data_time": self.data / steps,
            "step_time": self.training / steps,
            "images_per_second": images / self.training,
            "epoch_seconds": self.elapsed(),
        }


class EpochState:
    """The progress of an epoch.

    Attributes:
        epoch: from 1; 0 before the first one.
        step: number of steps done.
        meters: metrics of the epoch so far.
        recent: metrics since they were last logged to TensorBoard.
    """

    def __init__(self, device: torch.device, ranks: Ranks) -> None:
        self._device, self._ranks = device, ranks
        self.begin(0)

    def begin(self, epoch: int) -> None:
        """Stand at the beginning of `epoch`."""
        self.epoch, self.step = epoch, 0
        self.meters, self.recent, self.clock = Meters(), Meters(), Clock()

    def state_dict(self) -> dict[str, Any]:
        """The state for `load_state_dict`; every rank must call this."""
        meters, recent = (m.over(self._ranks).state_dict() for m in (self.meters, self.recent))
        return {"step": self.step, "clock": self.clock.state_dict(), "meters": meters, "recent": recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state. Its sums are over all ranks: the first rank continues them, the others start at zero."""
        for own, saved in ((self.meters, state["meters"]), (self.recent, state["recent"])):
            own.load_state_dict(saved, self._device)
            if not self._ranks.first:
                own.clear()
        self.step, self.clock = int(state["step"]), Clock(**state["clock"])
