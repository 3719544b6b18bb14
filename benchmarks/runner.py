"""One path of a benchmark, ready to train: its speed, its memory, what it asks of its device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from counting import allocated_mebibytes, counts, profiled

from mdistiller.engine.runtime.malloc import keep_freed_memory

# Steps that are counted on a GPU, where one takes milliseconds.
GPU_STEPS = 3


@dataclass
class Runner:
    """One path, ready to train; each turn goes over the same batches."""

    batches: Callable[[], Iterator[Any]]
    train: Callable[[Any], None]
    device: torch.device
    # Whether malloc keeps freed memory, as in this trainer, or returns it, as glibc does for the classic path.
    keeps_memory: bool

    def images_per_second(self, steps: int) -> float:
        """Images a second over `steps` steps, after one that fills the caches and starts the workers."""
        keep_freed_memory(self.keeps_memory)
        batches = self.batches()
        self.train(next(batches))
        self._wait()
        start, images = time.perf_counter(), 0
        for batch in islice(batches, steps):
            self.train(batch)
            images += len(batch[1])
        self._wait()
        reached = images / (time.perf_counter() - start)
        del batches  # which also ends the workers
        return reached

    def asks(self) -> dict[str, float]:
        """What a step asks of the device: `counting.counts`, and "peak_mib", its peak memory.

        The peak is beyond what is held before the step, as a CUDA graph holds all of its own.
        """
        batches = self.batches()
        self.train(next(batches))
        if self.device.type != "cuda":
            record = profiled(lambda: self.train(next(batches)), 1, self.device)
            return {"peak_mib": allocated_mebibytes(record), **counts(record, 1, self.device)}
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.train(next(batches))
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        record = profiled(lambda: self.train(next(batches)), GPU_STEPS, self.device)
        return {"peak_mib": peak, **counts(record, GPU_STEPS, self.device)}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
