"""Loader workers: their number, and that they outlive a signal to the group, in a plain DataLoader too."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from mdistiller.dataset import get_dataloaders, workers
from mdistiller.dataset.worker_failures import WorkerError
from mdistiller.dataset.workers import started, worker_counts

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture
def cpus(monkeypatch: pytest.MonkeyPatch):
    return lambda count: monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(count)), raising=False)


@pytest.fixture
def local_ranks(monkeypatch: pytest.MonkeyPatch):
    return lambda count: monkeypatch.setenv("LOCAL_WORLD_SIZE", str(count))


@pytest.mark.parametrize(
    ("number", "processes", "usable", "train", "val"),
    [
        (32, 8, 64, 4, 1),  # ImageNet's configurations on eight GPUs: 40 processes, not 512
        (32, 1, 64, 32, 8),
        (32, 1, 8, 8, 2),
        (32, 4, 4, 4, 1),
        (2, 1, 2, 2, 1),
        (2, 8, 16, 1, 1),
        (1, 1, 1, 1, 1),
        (0, 8, 64, 0, 0),
    ],
)
def test_workers_are_shared_by_the_ranks(cpus, local_ranks, number, processes, usable, train, val) -> None:
    cpus(usable)
    local_ranks(processes)
    assert worker_counts(number) == (train, val)


def test_both_loaders_of_a_data_set_get_their_number(cpus, local_ranks, tmp_path: Path) -> None:
    from tests.reliability import train_on_files  # registers "files"

    cpus(64)
    local_ranks(2)
    train_on_files.write_images(tmp_path)
    train, val, _ = get_dataloaders("files", 16, 16, 16, root=str(tmp_path))
    assert (train._loader.num_workers, val._loader.num_workers) == (8, 2)


def test_workers_that_live_on_are_not_waited_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several ranks pause before they fork; in the next pass the workers are there."""
    loader = DataLoader(torch.arange(4), num_workers=1, persistent_workers=True)
    monkeypatch.setattr(workers, "joined", lambda: True)
    assert len(list(started(loader))) == 4
    monkeypatch.setattr(workers, "QUIET_SECONDS", -1)  # which time.sleep refuses
    assert len(list(started(loader))) == 4
    with pytest.raises(ValueError, match="sleep"):
        started(DataLoader(torch.arange(4), num_workers=1))


def test_only_a_gpu_takes_pinned_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EXPERIMENT.DEVICE decides, not what the machine has; and it is chosen after the loader is made."""
    from tests.reliability import train_on_files

    train_on_files.write_images(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    train, *_ = get_dataloaders("files", 16, 16, 0, root=str(tmp_path))
    assert not train._loader.pin_memory and not train.to("cpu")._loader.pin_memory
    assert train.to("cuda:0")._loader.pin_memory and not train.to("cpu")._loader.pin_memory


class Slow(Dataset):
    """Eight numbers, each with the process that read it."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> tuple[int, int]:
        time.sleep(0.05)
        return i, os.getpid()


def note(worker: int) -> None:
    Path(os.environ["NOTES"], str(worker)).touch()


def test_a_plain_data_loader_s_workers_ignore_the_signals_too(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("NOTES", str(tmp_path))
    loader = DataLoader(Slow(), batch_size=1, num_workers=2, worker_init_fn=note)
    for _ in range(2):  # the second pass has new workers
        read = []
        for i, worker in started(loader):
            read.append(int(i))
            for number in (signal.SIGTERM, signal.SIGINT):
                sent = os.fork()  # another process sends it: what the training process itself sends is meant
                if not sent:
                    os.kill(int(worker), number)
                    os._exit(0)
                os.waitpid(sent, 0)
        assert read == list(range(8))
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}  # the loader's own worker_init_fn


def test_the_training_process_can_end_a_worker() -> None:
    loader = DataLoader(Slow(), batch_size=1, num_workers=1)
    iterator = started(loader)
    next(iterator)
    (worker,) = iterator._workers
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


def test_started_leaves_the_signal_mask_and_other_loaders_alone() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    list(started(DataLoader(Slow(), batch_size=4, num_workers=1)))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    assert list(started([1, 2])) == [1, 2] and DataLoader(Slow()).worker_init_fn is None


@pytest.mark.parametrize("busy", [False, True])  # the training process waits for a batch, or does something else
def test_a_worker_that_is_gone_is_told_when_a_batch_is_waited_for(busy: bool) -> None:
    iterator = started(DataLoader(Slow(), batch_size=1, num_workers=1, prefetch_factor=1), "N")
    next(iterator)
    (worker,) = iterator._workers
    os.kill(worker.pid, signal.SIGKILL)
    if busy:
        worker.join(10)  # torch would raise here
    with pytest.raises(WorkerError, match=rf"worker is gone \(process {worker.pid}: SIGKILL\); .* fewer .*\(N; 0"):
        list(iterator)


class Odd(Dataset):
    """Items that raise, or that another process cannot receive."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> object:
        if self.what == "lambda":
            return lambda: i
        if self.what == "gradient":
            return torch.ones(2, requires_grad=True) * 1
        if self.what == "files":
            raise OSError(24, "Too many open files", "mine")
        raise ValueError("Connection, 7")


@pytest.mark.parametrize(
    ("what", "error", "text"),
    [
        ("value", ValueError, "(?s)Original Traceback.*Connection, 7"),
        ("files", OSError, "(?s)Original Traceback.*Too many open files: 'mine'"),
        ("lambda", Exception, "(?s)Original Traceback.*pickle"),
        ("gradient", RuntimeError, "(?s)Original Traceback.*Cowardly refusing"),
    ],
)
def test_an_error_of_the_data_set_s_own_code_keeps_its_traceback(what: str, error: type, text: str) -> None:
    """Also one in pickling its items, for which a plain DataLoader waits without end."""
    with pytest.raises(error, match=text) as raised:
        list(started(DataLoader(Odd(what), batch_size=None, num_workers=1)))
    assert not isinstance(raised.value, WorkerError)


def test_a_refusal_to_open_files_names_the_limit() -> None:
    class Many(Dataset):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, i: int) -> list[torch.Tensor]:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            shared = [torch.ones(4).share_memory_() for _ in range(4)]
            free = os.dup(0)  # the lowest number that is free
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, limit))
            return shared

    with pytest.raises(WorkerError, match=r"open files .* `ulimit -n 65536`, or take fewer workers"):
        list(started(DataLoader(Many(), batch_size=None, num_workers=1)))
