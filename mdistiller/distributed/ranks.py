"""The processes of one run: one, or as many as torchrun started, each with a share of every batch."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from ..console import note, one_line
from ..errors import UserError

# What torchrun sets for every process that it starts.
_LAUNCH = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Seconds that processes which another launcher started wait for each other: variables of an earlier job name
# processes that never come.
_MEETING = 90.0
_NOTE_AFTER = 5.0


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

    def late_maximum(self) -> LateMaximum:
        """A `maximum` for every step, which does not wait for the others; see there."""
        return LateMaximum(self)

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


class LateMaximum:
    """`maximum`, one call late: a call starts to compare its numbers, and returns the result of the call before.

    So no rank waits for the others to come as far as itself, only for them to have come as far as its previous call.
    The n-th call returns the same number on all ranks, which must call it equally often. A single rank has its own
    number at once.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._pending: tuple[dist.Work, Tensor] | None = None

    def __call__(self, number: int) -> int:
        if self.ranks.world == 1:
            return number
        before = self.settle()
        numbers = torch.tensor(number)
        work = dist.all_reduce(numbers, dist.ReduceOp.MAX, group=_host_group(), async_op=True)
        self._pending = work, numbers
        return before

    def settle(self) -> int:
        """Wait for the last call's result and return it; 0 if there is none. Every rank must call this alike."""
        if self._pending is None:
            return 0
        (work, numbers), self._pending = self._pending, None
        work.wait()
        return int(numbers)


def joined() -> bool:
    """Whether this process belongs to a process group, as those that torchrun started do."""
    return dist.is_available() and dist.is_initialized()


def current_ranks() -> Ranks:
    """The `Ranks` of this process; outside `joined_ranks`, those of a single process."""
    if not joined():
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size(), of_environment("LOCAL_RANK", 0))


def of_environment(name: str, otherwise: int, least: int = 0) -> int:
    """The whole number, at least `least`, that an environment variable holds; `otherwise` where it is not
    set.

    Raises:
        UserError: it holds anything else.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return otherwise
    if not (text.isdecimal() and int(text) >= least):
        raise UserError(
            f"the environment variable {name} must be a whole number >= {least}, not {text!r}; run `unset {name}`, or "
            "start the processes with torchrun, which sets it"
        )
    return int(text)


def _check_launch(world: int) -> None:
    """Refuse an environment that names other processes, but not how to meet them: what an earlier job has left.

    Raises:
        UserError: names the variables, and what to unset.
    """
    missing = [name for name in _LAUNCH if not os.environ.get(name)]
    rank = of_environment("RANK", 0)
    if missing or rank >= world:
        why = f"{', '.join(missing)} not set" if missing else f"RANK is {rank}, which is not below it"
        raise UserError(
            f"the environment variable WORLD_SIZE is {world}, but {why}; torchrun sets all of them: if an earlier job "
            f"has left this one, run `{_unset()}`"
        )
    of_environment("MASTER_PORT", 0, least=1)


def _unset() -> str:
    left = [name for name in (*_LAUNCH, "LOCAL_RANK", "LOCAL_WORLD_SIZE") if name in os.environ]
    return f"unset {' '.join(left)}"


def _join(backend: str, world: int, timeout: timedelta) -> None:
    """Join the process group; torchrun's processes have met already, others wait `_MEETING` seconds for each other.

    Raises:
        UserError: not all of them came.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
        return
    rank, address, port = of_environment("RANK", 0), os.environ["MASTER_ADDR"], of_environment("MASTER_PORT", 0)
    whom = f"the {world} processes that WORLD_SIZE names, at MASTER_ADDR {address}, MASTER_PORT {port}"
    hint = f"if an earlier job has left these variables, stop this process and run `{_unset()}`"
    reminder = threading.Timer(_NOTE_AFTER, note, [f"waiting for {whom}; {hint}"])
    reminder.daemon = True
    reminder.start()
    try:
        store = dist.TCPStore(address, port, world, rank == 0, min(timeout, timedelta(seconds=_MEETING)))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"not all of {whom}, have come ({one_line(error, 150)}); {hint}") from None
    finally:
        reminder.cancel()


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
        UserError: more processes on this machine than GPUs, or `device` is one GPU for all of them; variables of an
            earlier job.
    """
    world = of_environment("WORLD_SIZE", 1, least=1)
    if world == 1:
        yield Ranks()
        return
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if cuda and "RANK" in os.environ:
        torch.cuda.set_device(_own_gpu(device, torch.cuda.device_count()))
    _check_launch(world)
    _join("nccl" if cuda else "gloo", world, timedelta(seconds=timeout))
    if cuda:
        _HOSTS.append(dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)))  # type: ignore[arg-type]
    try:
        yield current_ranks()
    finally:
        _HOSTS.clear()
        dist.destroy_process_group()


def _own_gpu(device: str, count: int) -> int:
    """The number of this rank's GPU, of `count` on this machine, where `device` is "auto", "cuda" or "cuda:N".

    Raises:
        UserError: several ranks would share a GPU.
    """
    local, processes = of_environment("LOCAL_RANK", 0), of_environment("LOCAL_WORLD_SIZE", 1, least=1)
    named = device.partition(":")[2]
    if named.isdecimal() and processes > 1:
        raise UserError(
            f"EXPERIMENT.DEVICE {device} is one GPU, but torchrun started {processes} processes on this machine; "
            "set it to auto, which gives each process its own"
        )
    if named.isdecimal() and int(named) < count:
        return int(named)
    if named:
        raise UserError(f"EXPERIMENT.DEVICE {device} is not available: there are {count} GPUs; set it to auto or cpu")
    if local >= count:
        raise UserError(
            f"torchrun started more processes on this machine than it has GPUs ({count}); "
            "set --nproc_per_node to their number, or EXPERIMENT.DEVICE cpu"
        )
    return local
