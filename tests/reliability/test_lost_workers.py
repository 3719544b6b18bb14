"""Loader workers that the system kills, or refuses what they need: one line, exit status 2, and `latest` whole."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from .._networks import write_untrained
from .runs import ONE_THREAD, REPOSITORY, differences
from .test_process_group import (  # noqa: F401
    TOOL,
    TORCHRUN,
    forked,
    launch_with,
    left,
    new_run,
    processes,
    wait_for,
    whole,
)
from .train_on_files import write_images

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes through /proc")


def status_of(run, process, seconds=120):
    """The exit status; never waited for without end."""
    until = time.monotonic() + seconds
    while (status := process.poll()) is None:
        if time.monotonic() > until:
            process.kill()
            pytest.fail(f"it still waits:\n{run.output.read_text()[-3000:]}")
        time.sleep(0.02)
    return status


def error_of(run):
    """The run's last line, which is its only error."""
    text = run.output.read_text()
    assert text.count("error: ") == 1 and "Traceback" not in text, text[-3000:]
    return text.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSEGV, marks=pytest.mark.slow)])
def test_a_worker_that_is_killed_ends_the_run_which_resumes(tmp_path, zygote, whole, number):  # noqa: F811
    run = new_run(tmp_path, forked(zygote))
    process = run.start()
    members = wait_for(run, process, members=3)
    os.kill(members[1], number)
    assert status_of(run, process) == 2, run.output.read_text()[-3000:]
    line = error_of(run)
    assert f"(process {members[1]}: {number.name})" in line and "DATASET.NUM_WORKERS" in line and "--resume" in line
    assert not left(members, 10)
    run.finish()
    assert differences(whole.log_path, run.log_path) == []


@pytest.mark.slow
def test_one_of_two_ranks_loses_its_worker(tmp_path):
    run = new_run(tmp_path, launch_with(*TORCHRUN), **{"DATASET.NUM_WORKERS": "4", "SOLVER.EPOCHS": "100"})
    process = run.start()
    members = wait_for(run, process, members=7)
    parents = processes()
    rank = next(pid for pid in members if parents[pid][0] == process.pid)
    worker = next(pid for pid in members if parents.get(pid, (0,))[0] == rank)
    os.kill(worker, signal.SIGKILL)
    assert status_of(run, process) != 0 and not left(members, 10)
    text = run.output.read_text()
    assert f"(process {worker}: SIGKILL)" in text and "--resume goes on after" in text, text[-3000:]
    torch.load(run.log_path / "latest", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [24, 28, 32, 33, 36])  # 40 are enough on some systems
def test_too_few_open_files(tmp_path, zygote, whole, limit):  # noqa: F811
    limited = launch_with()
    run = new_run(tmp_path, lambda *words: limited(*words, shell=["bash", "-c", f'ulimit -n {limit}; exec "$@"', "-"]))
    assert status_of(run, run.start()) == 2, run.output.read_text()[-3000:]
    line = error_of(run)
    assert "open files" in line and "ulimit -n" in line and "DATASET.NUM_WORKERS" in line
    if run.log_path.joinpath("latest").exists():
        torch.load(run.log_path / "latest", weights_only=True)


SMALL_SHM = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"', "-"]


@pytest.fixture
def in_small_shm():
    """A function that runs a command with a /dev/shm of 64 KiB; a batch of 64 images of `train_on_files` has 192."""
    if not shutil.which("unshare") or subprocess.run([*SMALL_SHM, "true"], capture_output=True).returncode:
        pytest.skip("needs a mount namespace")

    def run(folder, *words):
        return subprocess.run(
            [*SMALL_SHM, sys.executable, *map(str, words)], cwd=folder, env=os.environ | ONE_THREAD, timeout=120,
            text=True, capture_output=True,
        )  # fmt: skip

    write = lambda folder: (write_images(folder / "data"), write_untrained(folder / "net", "resnet8", seed=0))  # noqa: E731
    run.write = write
    return run


@pytest.mark.parametrize("tool", ["train", pytest.param("eval", marks=pytest.mark.slow)])
def test_a_small_shared_memory(tmp_path, in_small_shm, tool):
    in_small_shm.write(tmp_path)
    words = {
        "train": [
            "--cfg", REPOSITORY / "configs/digits/vanilla.yaml", "DATASET.TYPE", "files", "DATASET.ROOT", "data",
            "DATASET.NUM_WORKERS", 2, "SOLVER.BATCH_SIZE", 64, "LOG.WANDB", False, "EXPERIMENT.DEVICE", "cpu",
        ],
        "eval": [
            "-m", "resnet8", "-c", "net", "-d", "files", "--data-root", "data", "--num-workers", 1, "--device", "cpu",
        ],
    }  # fmt: skip
    done = in_small_shm(tmp_path, TOOL, "--command", tool, *words[tool])
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    setting = {"train": "DATASET.NUM_WORKERS", "eval": "--num-workers"}[tool]
    assert line.startswith("error: ") and "--shm-size" in line and setting in line
