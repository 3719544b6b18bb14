"""Where a run stands: its clock, the state of its epoch, its progress bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from ..distributed.ranks import Ranks
from .meters import Meters

# Seconds between two looks at the losses for the bar: each makes the host wait for the device.
_REFRESH = 1.0


class Clock:
    """Seconds of one epoch: waiting for data, training, and in all, those before an interruption included."""

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

    def stop_training(self) -> None:
        """What follows is validation."""
        self.training = self.elapsed()

    def state_dict(self) -> dict[str, float]:
        """The arguments of another clock that goes on from here."""
        return {"data": self.data, "training": self.elapsed()}

    def metrics(self, steps: int, images: int) -> dict[str, float]:
        """Seconds a step (of them, for data), images a second while training, seconds of the epoch up to now."""
        return {
            "data_time": self.data / steps,
            "step_time": self.training / steps,
            "images_per_second": images / self.training,
            "epoch_seconds": self.elapsed(),
        }


@dataclass
class EpochState:
    """How far an epoch has come.

    Attributes:
        epoch: from 1.
        step: steps that are done.
        meters: figures of the whole epoch up to now.
        recent: those since the last line to TensorBoard.
    """

    epoch: int
    step: int = 0
    meters: Meters = field(default_factory=Meters)
    recent: Meters = field(default_factory=Meters)
    clock: Clock = field(default_factory=Clock)

    def state_dict(self, ranks: Ranks) -> dict[str, Any]:
        """What `load_state_dict` takes; every rank must ask."""
        meters, recent = (m.over(ranks).state_dict() for m in (self.meters, self.recent))
        return {"step": self.step, "clock": self.clock.state_dict(), "meters": meters, "recent": recent}

    def load_state_dict(self, state: dict[str, Any], ranks: Ranks, device: torch.device) -> None:
        """Go on from a state. Its figures are sums over all ranks, which the first one takes over."""
        for own, saved in ((self.meters, state["meters"]), (self.recent, state["recent"])):
            own.load_state_dict(saved, device)
            if not ranks.first:
                own.clear()
        self.step, self.clock = state["step"], Clock(**state["clock"])


class Progress:
    """A bar on the terminal: steps, time left, learning rate, images a second, and each part of the loss.

    Args:
        epoch: for its title.
        steps: of the epoch.
        done: of them, before now.
        shown: whether this process shows it; never where stderr is no terminal.
    """

    def __init__(self, epoch: int, steps: int, done: int, shown: bool) -> None:
        off = not (shown and sys.stderr and sys.stderr.isatty())
        self.bar = tqdm(total=steps, initial=done, disable=off, desc=f"epoch {epoch}", leave=False, dynamic_ncols=True)
        self._looked, self._images = time.perf_counter(), 0

    def update(self, lr: float, meters: Meters, images: int) -> None:
        """One step on `images` images is done."""
        self.bar.update()
        self._images += images
        seconds = time.perf_counter() - self._looked
        if self.bar.disable or seconds < _REFRESH:
            return
        parts = {name.removeprefix("loss/"): f"{v:.3g}" for name, v in meters.means().items() if "loss" in name}
        self.bar.set_postfix({"lr": f"{lr:.3g}", **parts, "images/s": f"{self._images / seconds:.0f}"})
        self._looked, self._images = time.perf_counter(), 0

    def close(self) -> None:
        """Wipe the bar away."""
        self.bar.close()
