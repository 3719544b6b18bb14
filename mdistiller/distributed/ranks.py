"""The processes of one run: one, or as many as torchrun started, each with a share of every batch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from ..errors import UserError


@dataclass(frozen=True)
class Ranks:
    """The position of this process among those of its run.

    Attributes:
        rank: from 0; rank 0 writes the logs and the checkpoints.
        world: number of processes.
        local: rank among the processes on the same machine.
    """

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which prints and writes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def maximum(self, number: int) -> int:
        """The largest `number` of all ranks, on all of them."""
        if self.world == 1:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=_host_group())
        return int(numbers)

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every rank, in the order of the ranks, on all of them."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=_host_group())
        return values

    def copy_buffers(self, module: nn.Module) -> None:
        """Copy the buffers of rank 0 to all ranks, because each has the BatchNorm statistics of its own images."""
        if self.world > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """Rank 0 runs the `with` block first, then the others do."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def wait(self) -> None:
        """Wait until every rank has called this."""
        if self.world > 1:
            dist.barrier(group=_host_group())


def joined() -> bool:
    """Whether this process belongs to a process group, as those that torchrun started do."""
    return dist.is_available() and dist.is_initialized()


def current_ranks() -> Ranks:
    """The `Ranks` of this process; outside `joined_ranks`, those of a single process."""
    if not joined():
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))


# Numbers and barriers go over gloo between the CPUs, which does not wait for the work queued on the GPUs.
_HOSTS: list[dist.ProcessGroup] = []


def _host_group() -> dist.ProcessGroup | None:
    return _HOSTS[0] if _HOSTS else None


@contextmanager
def joined_ranks(device: str = "auto", timeout: float = 600.0) -> Iterator[Ranks]:
    """While the context is open, join the processes that torchrun started; without torchrun, this one is alone.

    Args:
        device: EXPERIMENT.DEVICE; GPUs communicate over NCCL, CPUs over gloo.
        timeout: seconds to wait for another rank before an error.

    Raises:
        UserError: more processes on this machine than GPUs.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "RANK" not in os.environ:
        yield Ranks()
        return
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda:
        if local >= torch.cuda.device_count():
            raise UserError(
                f"torchrun started more processes on this machine than it has GPUs ({torch.cuda.device_count()}); "
                "set --nproc_per_node to their number, or EXPERIMENT.DEVICE cpu"
            )
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout))
    if cuda:
        _HOSTS.append(dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)))  # type: ignore[arg-type]
    try:
        yield current_ranks()
    finally:
        _HOSTS.clear()
        dist.destroy_process_group()
