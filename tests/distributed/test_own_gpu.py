"""Which GPU a rank gets, by EXPERIMENT.DEVICE and torchrun's variables."""

import pytest

from mdistiller.distributed.ranks import _own_gpu, joined_ranks
from mdistiller.errors import UserError


@pytest.fixture
def torchrun(monkeypatch):
    def starts(local, processes):
        monkeypatch.setenv("LOCAL_RANK", str(local))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))

    return starts


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_each_rank_has_its_own(torchrun, device):
    for local in range(4):
        torchrun(local, 4)
        assert _own_gpu(device, 4) == local
    with pytest.raises(UserError, match=r"more processes on this machine than it has GPUs \(2\)"):
        _own_gpu(device, 2)


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_one_gpu_for_several_ranks_is_refused(torchrun, monkeypatch, device):
    torchrun(0, 2)
    message = f"EXPERIMENT.DEVICE {device} is one GPU, but torchrun started 2 processes on this machine; set it to auto"
    with pytest.raises(UserError, match=message):
        _own_gpu(device, 8)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=message), joined_ranks(device):  # before it waits for the others
        pass


def test_the_only_rank_of_a_machine_may_name_its_gpu(torchrun):
    torchrun(0, 1)
    assert _own_gpu("cuda:3", 4) == 3
