"""Signals, NaN losses, full disks, two runs in one folder, in real processes of tools/train.py."""

import fcntl
import json
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
import termios
import time
from contextlib import suppress

import pytest
import torch

from .runs import METHODS, ONE_THREAD, SETTINGS, TOOL, Run, differences, launch, timeless

KD = METHODS["KD"]
LONG = KD | {"SOLVER.EPOCHS": "100"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, zygote):
    run = Run(tmp_path_factory.mktemp("whole"), KD, zygote.launch)
    run.finish()
    return run


def written_at(path):
    """When a file was written, in ns; None while it does not exist."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def wait_for(run, file):
    """Wait until the run has written `file`."""
    until = time.monotonic() + 60
    while not list(run.folder.glob(f"output/p/*/{file}")):
        assert time.monotonic() < until
        time.sleep(0.002)


@pytest.mark.parametrize("number, forked", [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_signal_makes_the_run_save_and_say_how_to_resume_and_the_resumed_run_ends_the_same(
    tmp_path, zygote, whole, number, forked
):
    run = Run(tmp_path, KD, zygote.launch if forked else launch)
    process = run.start()
    wait_for(run, "latest")
    os.kill(process.pid, number)
    assert process.wait() == 128 + number
    last = run.output.read_text().splitlines()[-1]
    assert last == f"stopped by signal {number}; the same command with --resume goes on from here"
    latest = torch.load(run.log_path / "latest", weights_only=True)
    assert latest["epoch"] < 3 and latest["within_epoch"]["step"] >= 1
    run.launcher = zygote.launch
    run.finish()
    assert differences(whole.log_path, run.log_path) == []


def test_a_second_signal_ends_the_run_at_once(tmp_path, zygote):
    slow = {"DISTILLER.TYPE": "NONE", "DISTILLER.STUDENT": "wrn_16_2", "DATASET.TRAIN_FRACTION": "1.0"}
    for attempt in range(5):
        run = Run(tmp_path / str(attempt), slow | {"SOLVER.BATCH_SIZE": "256"}, zygote.launch)  # seconds a step
        process = run.start()
        wait_for(run, "train.events/steps/*")
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.3)
        os.kill(process.pid, signal.SIGINT)
        status = process.wait()
        if status != 143:  # 143: the step had ended before the second signal
            break
    assert status == -signal.SIGINT
    assert not list(run.log_path.glob("*latest"))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, zygote):
    explode = {"SOLVER.LR_DECAY_STAGES": "[1]", "SOLVER.LR_DECAY_RATE": "1e30", "SOLVER.EMA": "0"}
    run = Run(tmp_path, KD | explode, zygote.launch)
    assert run.start().wait() == 2
    error = run.output.read_text().splitlines()[-1]
    note = run.log_path / "non_finite.json"
    record = json.loads(note.read_text())
    assert error.startswith(f"error: epoch 2, iteration {record['iteration']}: loss_ce = ")
    assert "loss_kd = " in error and str(note.relative_to(tmp_path)) in error
    assert record["epoch"] == 2 and record["losses"].keys() == {"loss_ce", "loss_kd"}
    assert len(set(record["index"])) == 16 and all(0 <= index < 1438 for index in record["index"])
    latest = torch.load(run.log_path / "latest", weights_only=True)
    assert latest["epoch"] == 1 and all(tensor.isfinite().all() for tensor in latest["model"].values())


def test_skipping_steps_stops_at_the_limit(tmp_path, zygote):
    explode = {"SOLVER.LR": "1e30", "SOLVER.NAN_POLICY": "skip", "SOLVER.NAN_LIMIT": "2", "SOLVER.EMA": "0"}
    run = Run(tmp_path, KD | explode | {"LOG.SAVE_CHECKPOINT_ITERS": "0"}, zygote.launch)
    assert run.start().wait() == 2
    *_, first, second, error = run.output.read_text().splitlines()
    assert first.startswith("warning: epoch 1, iteration 2 is skipped")
    assert second.startswith("warning: epoch 1, iteration 3 is skipped")
    assert error.startswith("error: epoch 1, iteration 4: ")


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path, whole, zygote):
    same, other = Run(tmp_path / "same", KD, zygote.launch), Run(tmp_path / "other", KD, zygote.launch)
    same.finish()
    assert differences(whole.log_path, same.log_path) == []
    other.settings = KD | {"EXPERIMENT.SEED": "1"}
    other.finish()
    latest = [torch.load(run.log_path / "student_latest", weights_only=True)["model"] for run in (same, other)]
    assert not any(torch.equal(latest[0][k], latest[1][k]) for k in latest[0] if k.endswith("conv1.weight"))
    assert timeless(same.log_path / "metrics.csv") != timeless(other.log_path / "metrics.csv")


def no_space(run, process):
    """As on a full disk: from now on no file of the process may exceed 600 kB; `latest` is larger."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (600_000, 600_000))


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_checkpoint_that_does_not_fit_leaves_the_previous_one(tmp_path, zygote, policy):
    run = Run(tmp_path, KD | {"LOG.SAVE_CHECKPOINT_ITERS": "1", "LOG.SAVE_ERROR": policy}, zygote.launch)
    process = run.start()
    wait_for(run, "latest")
    no_space(run, process)
    status = process.wait()
    state = torch.load(run.log_path / "latest", weights_only=True)
    said = [line for line in run.output.read_text().splitlines() if "cannot write" in line]
    assert "latest (File too large): 1," in said[0] and "bytes needed" in said[0] and "free in output" in said[0]
    assert not list(run.log_path.glob(".*.partial"))
    assert state["epoch"] == 0 and state["within_epoch"]["step"] >= 1
    if policy == "stop":
        assert status == 2 and said == [run.output.read_text().splitlines()[-1]] and said[0].startswith("error: ")
    else:
        assert status == 0 and len(said) > 20 and said[0].endswith("training goes on to the next save")
    run.finish()


@pytest.mark.parametrize("saved_before", [False, True])
def test_a_run_that_is_stopped_on_a_full_disk_does_not_say_that_it_goes_on_from_here(tmp_path, zygote, saved_before):
    """With LOG.SAVE_ERROR continue."""
    every_step = {"LOG.SAVE_CHECKPOINT_ITERS": "1"} if saved_before else {"LOG.SAVE_CHECKPOINT_ITERS": "0"}
    run = Run(tmp_path, LONG | every_step | {"LOG.SAVE_ERROR": "continue"}, zygote.launch)
    process = run.start()
    wait_for(run, "latest" if saved_before else "train.events/steps/*")
    no_space(run, process)
    until = time.monotonic() + 60
    while "cannot write" not in run.output.read_text():
        assert time.monotonic() < until
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait() == 143
    last = run.output.read_text().splitlines()[-1]
    if (run.log_path / "latest").exists():
        latest = torch.load(run.log_path / "latest", weights_only=True)
        within, epochs = latest.get("within_epoch"), latest["epoch"]
        where = f"epoch {epochs + 1}, step {within['step']}" if within else f"the end of epoch {epochs}"
        assert last == (
            "stopped by signal 15; nothing could be written here: the same command with --resume resumes from the last "
            f"saved checkpoint ({where})"
        )
    else:
        assert last == "stopped by signal 15; no checkpoint could be written, so there is none to resume from"


def test_two_ranks_agree_on_a_save_that_failed(tmp_path, zygote):
    """The rank that did not write tries again with the one that did, and both stop; nothing waits for ever."""
    run = Run(tmp_path, LONG | {"LOG.SAVE_ERROR": "continue"}, zygote.launch_pair)
    pair = run.start()
    wait_for(run, "latest")
    until = time.monotonic() + 60
    while not (run.log_path / ".latest.partial").is_dir():  # so that nothing can be written
        with suppress(FileExistsError):  # it is just being written
            (run.log_path / ".latest.partial").mkdir()
    while "cannot write" not in run.output.read_text():
        assert pair.poll() is None and time.monotonic() < until
        time.sleep(0.002)
    os.kill(pair.ranks[1].pid, signal.SIGTERM)
    assert [rank.wait() for rank in pair.ranks] == [143, 143], run.output.read_text()[-3000:]
    said = [line for line in run.output.read_text().splitlines() if line.startswith("stopped by signal")]
    assert len(said) == 1 and "nothing could be written here: the same command with --resume resumes from" in said[0]


def cramped(arguments, folder, output, environment):
    """Like `launch`, but no file may exceed two kilobytes."""
    with output.open("w") as out:
        command = ["sh", "-c", 'ulimit -f 4; exec "$0" "$@"', sys.executable, str(TOOL), *arguments]
        return subprocess.Popen(command, cwd=folder, stdout=out, stderr=out, env=os.environ | ONE_THREAD | environment)


@pytest.mark.parametrize("more", [["--overwrite"], []])
def test_a_disk_that_is_full_at_the_start_gives_a_one_line_error(tmp_path, whole, more):
    """For a new and a resumed run; the latter's checkpoints stay unchanged."""
    shutil.copytree(whole.folder, tmp_path, dirs_exist_ok=True)
    run = Run(tmp_path, KD, cramped)
    shutil.copy(run.log_path / "epoch_2", run.log_path / "latest")
    before = {path.name: path.read_bytes() for path in run.log_path.iterdir() if path.is_file()}
    assert run.start(*more).wait() == 2
    (error,) = [line for line in run.output.read_text().splitlines() if "rror" in line]
    assert error.startswith("error: cannot write output/p/") and "config.yaml (File too large): " in error
    assert more or {path.name: path.read_bytes() for path in run.log_path.iterdir() if path.is_file()} == before


def test_a_folder_that_vanishes_stops_the_run_and_is_named(tmp_path, zygote):
    run = Run(tmp_path, LONG, zygote.launch)
    process = run.start()
    wait_for(run, "latest")
    folder = run.log_path
    shutil.rmtree(folder)
    assert process.wait() == 2
    assert "latest (No such file or directory): " in run.output.read_text().splitlines()[-1]


def test_a_second_run_in_the_folder_is_refused_with_the_process_of_the_first(tmp_path, zygote):
    run = Run(tmp_path, LONG, zygote.launch)
    first = run.start()
    wait_for(run, "latest")
    before = {path.name for path in run.log_path.iterdir()}
    for flag in ("--resume", "--overwrite"):
        second = Run(tmp_path, LONG, zygote.launch)
        second.output = tmp_path / f"second{flag}.txt"
        assert second.start(*([flag] if flag == "--overwrite" else [])).wait() == 2
        line = second.output.read_text().splitlines()[-1]
        assert line.startswith(f"error: {run.log_path.relative_to(tmp_path)} is in use by process {first.pid} on host ")
    assert before <= {path.name for path in run.log_path.iterdir()}
    assert first.poll() is None
    first.kill()
    first.wait()
    third = run.start()  # the first is dead
    assert run.begun(third)
    third.kill()
    third.wait()


def test_a_finished_run_is_not_overwritten(tmp_path, whole):
    before = {path.name: path.read_bytes() for path in whole.log_path.iterdir() if path.is_file()}
    settings = [word for pair in (SETTINGS | KD).items() for word in pair]
    output = tmp_path / "output.txt"
    process = whole.launcher(["--cfg", "empty.yaml", *settings], whole.folder, output, {})
    assert process.wait() == 2
    assert "already holds a run; add --resume" in output.read_text().splitlines()[-1]
    assert {path.name: path.read_bytes() for path in whole.log_path.iterdir() if path.is_file()} == before


def test_overwriting_a_run_removes_its_old_checkpoints(tmp_path, zygote, whole):
    shutil.copytree(whole.folder, tmp_path / "run")
    run = Run(tmp_path / "run", KD, zygote.launch)
    assert (run.log_path / "epoch_2").exists()
    before = written_at(run.log_path / "latest")
    process = run.start("--overwrite")
    while written_at(run.log_path / "latest") in (None, before):
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not {path.name for path in run.log_path.iterdir()} & {"best", "epoch_2", "student_2", "student_best"}
    run.finish()
    assert differences(whole.log_path, run.log_path) == []


def test_a_closed_terminal_does_not_stop_the_run(tmp_path, whole):
    controller, terminal = pty.openpty()

    def in_terminal(arguments, folder, output, environment):
        def take():
            os.setsid()
            fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

        return subprocess.Popen(
            [sys.executable, TOOL, *arguments], cwd=folder, env=os.environ | ONE_THREAD, preexec_fn=take,
            stdin=terminal, stdout=terminal, stderr=terminal,
        )  # fmt: skip

    run = Run(tmp_path, KD, in_terminal)
    process = run.start()
    os.close(terminal)
    wait_for(run, "latest")
    os.close(controller)  # which sends SIGHUP
    assert process.wait() == 0
    assert differences(whole.log_path, run.log_path) == []
