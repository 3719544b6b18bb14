"""The progress bar on the terminal."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from .meters import Meters

# Seconds between two readings of the losses for the bar: each reading makes the host wait for the device.
_REFRESH = 1.0


class ProgressBar:
    """Steps, time left, learning rate, images per second, and each loss term.

    Args:
        epoch: shown in the title; a number, or what a stage calls it.
        steps: number of steps of the epoch.
        done: number of these already done.
        shown: whether this process shows the bar; it is never shown if stderr is not a terminal.
    """

    def __init__(self, epoch: int | str, steps: int, done: int, shown: bool) -> None:
        off = not (shown and sys.stderr and sys.stderr.isatty())
        title = epoch if isinstance(epoch, str) else f"epoch {epoch}"
        self.bar = tqdm(total=steps, initial=done, disable=off, desc=title, leave=False, dynamic_ncols=True)
        self._refreshed, self._images = time.perf_counter(), 0

    def update(self, lr: float, meters: Meters, images: int) -> None:
        """One step on `images` images is done."""
        self.bar.update()
        self._images += images
        seconds = time.perf_counter() - self._refreshed
        if self.bar.disable or seconds < _REFRESH:
            return
        terms = {name.removeprefix("loss/"): f"{v:.3g}" for name, v in meters.means().items() if "loss" in name}
        self.bar.set_postfix({"lr": f"{lr:.3g}", **terms, "images/s": f"{self._images / seconds:.0f}"})
        self._refreshed, self._images = time.perf_counter(), 0

    def close(self) -> None:
        """Remove the bar from the terminal."""
        self.bar.close()
