"""Variables of an earlier torchrun job in the environment: one line that names them, and no waiting for ever."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mdistiller.dataset.workers import worker_counts
from mdistiller.distributed import ranks
from mdistiller.distributed.ranks import joined_ranks
from mdistiller.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
ALL = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
PLACE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in ALL:
        monkeypatch.delenv(name, raising=False)


LEFT = {
    "WORLD_SIZE alone": ({"WORLD_SIZE": "2"}, r"is 2, but RANK, MASTER_ADDR, MASTER_PORT not .*`unset WORLD_SIZE`"),
    "without a place": ({"WORLD_SIZE": "2", "RANK": "0"}, r"MASTER_ADDR, MASTER_PORT not set.*`unset RANK WORLD_SIZE`"),
    "a rank too many": ({"WORLD_SIZE": "2", "RANK": "2", **PLACE}, "RANK is 2, which is not below it"),
    "no number": ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number >= 1, not 'two'; run `unset WORLD_SIZE`"),
    "none": ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number >= 1, not '0'"),
    "a negative rank": ({"WORLD_SIZE": "2", "RANK": "-1", **PLACE}, "RANK must be a whole number >= 0, not '-1'"),
    "no port": ({"WORLD_SIZE": "2", "RANK": "0", **PLACE, "MASTER_PORT": "x"}, "MASTER_PORT must be a whole number"),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_a_leftover_is_named(case, monkeypatch):
    variables, message = LEFT[case]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message), joined_ranks("cpu"):
        pass


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "1"}, {"LOCAL_RANK": "1"}, PLACE, {"WORLD_SIZE": "1", "RANK": "0"}, {"WORLD_SIZE": ""},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "7"},
    ],
)  # fmt: skip
def test_what_names_no_other_process_changes_nothing(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with joined_ranks("cpu") as here:
        assert here.world == 1 and here.first


def test_processes_that_never_come(monkeypatch, capfd):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", **PLACE, "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "_MEETING", 1.0)
    message = rf"^not all of the 2 processes that WORLD_SIZE names, at MASTER_ADDR .*, MASTER_PORT {port}, have come"
    with pytest.raises(UserError, match=message) as error, joined_ranks("cpu"):
        pass
    assert "run `unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT`" in str(error.value) and "\n" not in str(error.value)


def test_the_number_of_workers(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "many")
    with pytest.raises(UserError, match="LOCAL_WORLD_SIZE must be a whole number >= 1, not 'many'"):
        worker_counts(2)


def test_a_real_process():
    call = [sys.executable, "-m", "mdistiller", "train", "--cfg", "configs/digits/vanilla.yaml"]
    environment = {**os.environ, "WORLD_SIZE": "2", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(call, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: the environment variable WORLD_SIZE is 2") and done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("script", [("-m", "mdistiller", "train"), ("tools/train.py",)], ids=["module", "tool"])
def test_torch_distributed_launch(script, tmp_path):
    """It adds --local-rank=N in front of the other arguments."""
    launch = [sys.executable, "-W", "ignore", "-m", "torch.distributed.launch", "--standalone", "--nproc_per_node=2"]
    more = ["--cfg", "configs/digits/vanilla.yaml", "LOG.WANDB", "False", "EXPERIMENT.DEVICE", "cpu"]
    more += ["DATASET.TRAIN_FRACTION", "0.1", "SOLVER.EPOCHS", "1", "LOG.PREFIX", tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    call = [*launch, *script, *map(str, more)]
    done = subprocess.run(call, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "epoch 1/1" in done.stdout and len(list(tmp_path.rglob("metrics.csv"))) == 1
