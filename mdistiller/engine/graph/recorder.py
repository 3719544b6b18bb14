"""What records a function as a CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

import torch

Function = Callable[[], None]


class Recorder(Protocol):
    """Records what a function does to tensors, so that it can be done again without Python."""

    def rehearse(self, function: Function) -> None:
        """Run `function` once, as it will be recorded.

        Raises:
            Exception: it cannot be recorded.
        """

    def record(self, function: Function) -> Function:
        """A function that does what `function` does, on the same tensors. `function` runs, but changes no tensor."""


class GpuRecorder:
    """Records CUDA graphs on one GPU. They hold kernels and addresses; everything else is as it was when recorded.

    https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def rehearse(self, function: Function) -> None:
        """On a stream beside the usual one, as recording does. A read by the host is an error, instead of a wait."""
        usual, beside = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        beside.wait_stream(usual)
        try:
            with torch.cuda.stream(beside), refusing_to_wait():
                function()
        finally:
            usual.wait_stream(beside)

    def record(self, function: Function) -> Function:
        self._check_room()
        graph, usual = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        pool = torch.cuda.graph_pool_handle()
        try:
            # Other threads, such as one that pins batches, may go on with what they do.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                function()
        except Exception:
            self._recover(usual, pool)
            raise
        return graph.replay

    def _check_room(self) -> None:
        """Refuse to record where a graph, which keeps the memory of a step, and other batches do not both fit.

        Raises:
            RuntimeError: they do not.
        """
        allocated = torch.cuda.memory_allocated(self.device)
        step = torch.cuda.max_memory_allocated(self.device) - allocated
        free = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device) - allocated
        if 2 * step > free:
            sizes = f"{step / 2**30:.1f} GiB, and validation as much; {free / 2**30:.1f} GiB are free"
            raise RuntimeError(f"too little memory: a graph may keep {sizes}")

    def _recover(self, usual: torch.cuda.Stream, pool: tuple[int, int]) -> None:
        """Undo what torch leaves of a recording that failed: another stream, an allocator and a generator that wait.

        An allocator that waits for the end of a recording gives no cached memory back: the next `empty_cache()`, and so
        the next recording, fails with an internal assertion, and a full memory is not searched for blocks to free.
        """
        torch.cuda.set_stream(usual)
        with suppress(AttributeError, RuntimeError):  # torch itself has ended it
            torch._C._cuda_endAllocateToPool(usual.device_index, pool)
            torch._C._cuda_releasePool(usual.device_index, pool)
        generator = torch.cuda.default_generators[usual.device_index]
        with suppress(AttributeError):  # an older torch
            generator.graphsafe_set_state(generator.clone_state())


@contextmanager
def refusing_to_wait() -> Iterator[None]:
    """Within this context, what would make the host wait for the GPU raises a RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():  # that this mode does not see everything yet
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
