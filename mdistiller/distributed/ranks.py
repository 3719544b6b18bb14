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
    """This process among those of its run.

    Attributes:
        rank: from 0; rank 0 writes the logs and the checkpoints.
        world: how many there are.
        local: this process among those on its machine.
    """

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes."""
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
        """Every rank's `value`, in their order, on all of them."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=_host_group())
        return values

    def copy_buffers(self, module: nn.Module) -> None:
        """Give every rank the buffers of rank 0: BatchNorm's statistics are of each rank's own images."""
        if self.world > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """What is inside is done by rank 0, then by the others."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world > 1:
            dist.barrier(group=_host_group())


def current_ranks() -> Ranks:
    """This process's place; one process alone where `joined_ranks` is not open."""
    if not dist.is_initialized():
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))


# The hosts exchange numbers and barriers over gloo, which does not wait for the work that is queued on the GPUs.
_HOSTS: list[dist.ProcessGroup] = []


def _host_group() -> dist.ProcessGroup | None:
    return _HOSTS[0] if _HOSTS else None


@contextmanager
def joined_ranks(device: str = "auto", timeout: float = 600.0) -> Iterator[Ranks]:
    """Join the processes that torchrun started for as long as the context is open; else this process alone.

    Args:
        device: EXPERIMENT.DEVICE; GPUs talk over NCCL, processors over gloo.
        timeout: seconds after which waiting for another rank is given up.

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
                f"torchrun started more processes here than there are GPUs ({torch.cuda.device_count()}); "
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
