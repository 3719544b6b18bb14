"""SIGTERM to every process of a run, as from `docker stop`, `scancel`, `timeout` and torchrun: with loader workers, on
one rank and on two. The run saves, nothing stays behind, and the resumed run ends as one that was never stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from .runs import METHODS, ONE_THREAD, Run, differences
from .train_on_files import write_images

TOOL = Path(__file__).with_name("train_on_files.py")
SETTINGS = METHODS["KD"] | {
    "DATASET.TYPE": "files", "DATASET.ROOT": "data", "DATASET.NUM_WORKERS": "2", "DATASET.TRAIN_FRACTION": "1.0",
    "DATASET.VAL_FRACTION": "0.0", "DATASET.TEST.BATCH_SIZE": "8",
}  # fmt: skip
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes through /proc")


def launch_with(*before, **variables):
    def start(arguments, folder, output, environment, shell=()):
        with output.open("a") as out:
            return subprocess.Popen(
                [*shell, sys.executable, *before, str(TOOL), *arguments], cwd=folder, stdout=out, stderr=out,
                start_new_session=True, env=os.environ | ONE_THREAD | environment | variables,
            )  # fmt: skip

    return start


def forked(zygote):
    return lambda *words: zygote.start(TOOL, *words)


def new_run(folder, launcher, **settings):
    write_images(folder / "data")
    return Run(folder, SETTINGS | settings, launcher)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, zygote):
    run = new_run(tmp_path_factory.mktemp("whole"), forked(zygote))
    run.finish()
    return run


def processes():
    """{process: (parent, session)} of everything that runs, zombies left out."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has just ended
            continue
        if state not in "ZX":
            found[int(stat.parent.name)] = int(parent), int(session)
    return found


def family(pid):
    """The process, its children, theirs, ..."""
    every, found = processes(), [pid]
    for parent in found:
        found += [child for child, (its, _) in every.items() if its == parent]
    return found


def wait_for(run, process, *, members):
    """Wait until the run has a checkpoint of a step and so many processes; returns these."""
    until = time.monotonic() + 120
    while not (list(run.folder.glob("output/p/*/latest")) and len(family(process.pid)) >= members):
        assert process.poll() is None and time.monotonic() < until, run.output.read_text()[-3000:]
        time.sleep(0.01)
    return family(process.pid)


def left(pids, seconds):
    """Those of the processes that still run after at most so many seconds."""
    until = time.monotonic() + seconds
    while (alive := set(pids) & processes().keys()) and time.monotonic() < until:
        time.sleep(0.05)
    return alive


def said(run):
    return run.output.read_text().count("stopped by signal 15; the same command with --resume goes on from here")


def test_sigterm_to_the_group_of_a_run_with_workers(tmp_path, zygote, whole):
    run = new_run(tmp_path, forked(zygote))
    process = run.start()
    members = wait_for(run, process, members=3)
    os.killpg(process.pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)  # as `timeout` does, which signals its child and then the group
    assert process.wait() == 143, run.output.read_text()[-3000:]
    assert said(run) == 1 and not left(members, 10)
    run.finish()
    assert differences(whole.log_path, run.log_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_group_of_a_run_with_spawned_workers(tmp_path, zygote, whole, number):
    run = new_run(tmp_path, launch_with(START_METHOD="spawn"), **{"SOLVER.EPOCHS": "100"})
    process = run.start()
    members = wait_for(run, process, members=4)  # two workers, and multiprocessing's tracker of resources
    os.killpg(process.pid, number)
    assert process.wait() == 128 + number, run.output.read_text()[-3000:]
    assert not left(members, 10)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_end_with_a_run_that_is_killed(tmp_path, method):
    run = new_run(tmp_path, launch_with(START_METHOD=method), **{"SOLVER.EPOCHS": "100"})
    process = run.start()
    members = wait_for(run, process, members=3 if method == "fork" else 4)
    process.kill()
    process.wait()
    assert not left(members, 10)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "4"])
@pytest.mark.parametrize("everyone", [False, True])
def test_sigterm_under_torchrun(tmp_path, workers, everyone):
    """To torchrun, which passes it on to the process groups of its ranks; or to every process, as by `scancel`."""
    runs = [
        new_run(tmp_path / name, launch_with(*TORCHRUN), **{"DATASET.NUM_WORKERS": workers})
        for name in ("whole", "stopped")
    ]
    whole, stopped = runs
    whole.finish()
    process = stopped.start()
    members = wait_for(stopped, process, members=7 if workers == "4" else 3)
    for pid in members if everyone else [process.pid]:
        os.kill(pid, signal.SIGTERM)
    assert process.wait() != 0
    assert said(stopped) == 1 and not left(members, 10), stopped.output.read_text()[-5000:]
    stopped.finish()
    assert differences(whole.log_path, stopped.log_path) == []


@pytest.mark.slow
def test_two_ranks_stop_within_validation(tmp_path, zygote):
    """Of which they have different numbers of batches: one image each, 429 in all."""
    long = METHODS["KD"] | {
        "DATASET.VAL_FRACTION": "0.298", "DATASET.TEST.BATCH_SIZE": "1", "SOLVER.EPOCHS": "2",
        "LOG.SAVE_CHECKPOINT_ITERS": "7",
    }  # fmt: skip
    whole, stopped = (Run(tmp_path / name, long, zygote.launch_pair) for name in ("whole", "stopped"))
    whole.finish()
    pair = stopped.start()
    while not list(stopped.folder.glob("output/p/*/latest")):  # after all steps of the first epoch
        assert pair.poll() is None
        time.sleep(0.002)
    os.kill(pair.ranks[1].pid, signal.SIGTERM)
    assert [rank.wait() for rank in pair.ranks] == [143, 143], stopped.output.read_text()[-3000:]
    latest = torch.load(stopped.log_path / "latest", weights_only=True)
    assert latest["epoch"] == 0 and latest["within_epoch"]["step"] == 7
    stopped.finish()
    assert differences(whole.log_path, stopped.log_path) == []
