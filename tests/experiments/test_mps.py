"""NVIDIA's MPS for runs that share a GPU: a stand-in for its program, and real processes and signals."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mdistiller.experiments import mps
from mdistiller.experiments.launch import run_here
from mdistiller.experiments.mps import daemon_runs, gpu_environments

from .test_launch import job_of, quick  # noqa: F401

REPOSITORY = Path(__file__).resolve().parents[2]
# As NVIDIA documents the program: -d starts a daemon, without arguments it takes commands from stdin.
STAND_IN = """#!/bin/sh
pipes="${CUDA_MPS_PIPE_DIRECTORY:-/none}"
command="$1"
[ -n "$command" ] || read -r command
echo "$command|${CUDA_VISIBLE_DEVICES-}|$pipes|${CUDA_MPS_LOG_DIRECTORY-}" >> "${0%/*}/calls"
case "$command" in
-d)
    [ ! -f "${0%/*}/broken" ] || { cat "${0%/*}/broken"; exit 1; }
    mkfifo "$pipes/control"
    "$0" serve < /dev/null &
    echo $! > "$pipes/nvidia-cuda-mps-control.pid";;
serve)
    while [ -p "$pipes/control" ]; do
        read -r command < "$pipes/control" || continue  # no line: the last writer closes late, or one was ended
        [ ! -f "${0%/*}/deaf" ] || continue
        [ "$command" != quit ] || break
    done
    rm "$pipes/control" "$pipes/nvidia-cuda-mps-control.pid";;
*)
    kill -0 "$(cat "$pipes/nvidia-cuda-mps-control.pid")" || { echo Cannot find MPS control daemon process; exit 1; }
    echo "$command" > "$pipes/control";;
esac
"""


CLIENT = mps._CLIENT


class StandIn:
    """The stand-in in its folder, and what it was called with."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        program = folder / mps.PROGRAM
        program.write_text(STAND_IN)
        program.chmod(0o755)

    def calls(self, *commands):
        """(command, CUDA_VISIBLE_DEVICES, pipes, logs) of the calls with these commands."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [call for call in (tuple(line.split("|")) for line in lines) if call[0] in commands]

    def left(self):
        """The numbers of its processes that still run."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if str(self.folder).encode() in path.read_bytes():
                    found.append(int(path.parent.name))
            except OSError:
                continue
        return found


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    monkeypatch.setattr(mps, "_PLACE", str(tmp_path / "no_mps"))
    monkeypatch.setattr(mps, "_CLIENT", "")  # the stand-in serves no GPU
    own = StandIn(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{own.folder}:{os.environ['PATH']}")
    yield own
    for pid in own.left():
        os.kill(pid, signal.SIGKILL)


def test_each_gpu_has_a_daemon_of_its_own_while_the_runs_last(stand_in, capsys):
    with gpu_environments(["3", "GPU-ab"], 4) as environments:
        starts = stand_in.calls("-d")
        assert [devices for _, devices, *_ in starts] == ["3", "GPU-ab"]
        assert [e["CUDA_VISIBLE_DEVICES"] for e in environments] == ["0", "GPU-ab"], "as the daemon numbers them"
        given = [(e["CUDA_MPS_PIPE_DIRECTORY"], e["CUDA_MPS_LOG_DIRECTORY"]) for e in environments]
        assert given == [(pipes, logs) for *_, pipes, logs in starts]
        folders = {Path(pipes).parent for pipes, _ in given}
        assert len(folders) == 2 and all(f.stat().st_mode & 0o777 == 0o700 for f in folders)
        assert all(len(pipes) < 60 for pipes, _ in given), "names of sockets are short"
        assert len(stand_in.left()) == 2
    assert sorted(pipes for *_, pipes, _ in stand_in.calls("quit")) == sorted(pipes for pipes, _ in given)
    assert stand_in.left() == [] and not any(folder.exists() for folder in folders)
    said = capsys.readouterr().err
    assert said == "note: 4 runs at a time share 2 GPU(s) through NVIDIA's MPS, which was started for them\n"


def test_the_runs_get_its_variables_and_it_ends_after_them(stand_in, tmp_path, quick):  # noqa: F811
    names = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_VISIBLE_DEVICES"
    quick(f"import os, time; time.sleep(0.2); print(*(os.environ[name] for name in {names}))")
    jobs = [job_of(tmp_path, name) for name in "abc"]
    assert [error for _, error in run_here(jobs, 3, ["7"])] == [""] * 3
    ((_, _, pipes, _),) = stand_in.calls("-d")
    assert {(job.folder / "train.log").read_text() for job in jobs} == {f"{pipes} 0\n"}
    assert len(stand_in.calls("quit")) == 1 and stand_in.left() == []


@pytest.mark.parametrize("case", ["a GPU for each", "one run is left", "runs on the CPU", "no GPU"])
def test_it_is_not_started_where_no_runs_share_a_gpu(case, stand_in, tmp_path, quick):  # noqa: F811
    quick("pass")
    device = {"EXPERIMENT__DEVICE": "cpu"} if case == "runs on the CPU" else {}
    jobs = [job_of(tmp_path, name, **device) for name in ("a" if case == "one run is left" else "ab")]
    gpus = {"a GPU for each": ["0", "1"], "no GPU": []}.get(case, ["0"])
    assert [error for _, error in run_here(jobs, 2, gpus)] == [""] * len(jobs)
    assert stand_in.calls("-d") == []


def test_it_ends_when_the_runs_stop_early(stand_in, tmp_path, quick):  # noqa: F811
    quick("raise SystemExit('broken')")
    outcomes = run_here([job_of(tmp_path, name) for name in "abc"], 2, ["0"])
    assert next(outcomes)[1] == "broken"
    outcomes.close()
    assert len(stand_in.calls("quit")) == 1 and stand_in.left() == []


def test_a_running_daemon_is_used_and_not_ended(stand_in, tmp_path, monkeypatch, capsys):
    pipes = tmp_path / "pipes"
    pipes.mkdir()
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(pipes))
    assert not daemon_runs()
    with (tmp_path / "out").open("w") as out:
        subprocess.run([stand_in.folder / mps.PROGRAM, "-d"], check=True, stdout=out, stderr=out)
    with gpu_environments(["0"], 2) as environments:
        assert environments == [{"CUDA_VISIBLE_DEVICES": "0"}]
    assert len(stand_in.calls("-d")) == 1 and stand_in.calls("quit") == [] and len(stand_in.left()) == 1
    said = capsys.readouterr().err
    assert said == "note: 2 runs at a time share 1 GPU(s) through NVIDIA's MPS, which was running already\n"


def test_what_a_killed_daemon_left_is_no_daemon(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(mps, "_PLACE", str(tmp_path))
    (tmp_path / "control").touch()
    (tmp_path / "nvidia-cuda-mps-control.pid").write_text(f"{os.getpid()}\n")  # the number is another's by now
    monkeypatch.setenv("PATH", "/none")
    assert not daemon_runs()


def without(reason):
    return f"warning: the runs on one GPU take turns, because NVIDIA's MPS is not used: {reason}"


def test_without_the_program_one_line_says_what_to_install(stand_in, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/none")
    with gpu_environments(["0", "1"], 3) as environments:
        assert environments == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    said = capsys.readouterr().err
    assert said == without(
        "nvidia-cuda-mps-control is not on PATH; install it (it comes with NVIDIA's driver), or start the daemon\n"
    )


def test_other_systems_get_one_line(stand_in, monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "win32")
    with gpu_environments(["0"], 2) as environments:
        assert environments == [{"CUDA_VISIBLE_DEVICES": "0"}]
    assert capsys.readouterr().err == without("there is none but on Linux\n") and stand_in.calls("-d") == []


def test_gpus_of_amd_need_none_and_nothing_is_said(stand_in, monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with gpu_environments(["0"], 2) as environments:
        assert environments == [{"CUDA_VISIBLE_DEVICES": "0"}]
    assert capsys.readouterr().err == "" and stand_in.calls("-d") == []


def test_a_daemon_that_does_not_start_gives_one_line_and_the_others_end(stand_in, capsys):
    (stand_in.folder / "broken").write_text("An instance of this daemon\nis already running\n")
    with gpu_environments(["0"], 2) as environments:
        assert environments == [{"CUDA_VISIBLE_DEVICES": "0"}]
    start = "`nvidia-cuda-mps-control -d` starts no daemon that answers"
    assert capsys.readouterr().err == without(f"{start} (An instance of this daemon is already running)\n")
    ((_, _, pipes, _),) = stand_in.calls("-d")
    assert not Path(pipes).parent.exists()


def test_a_daemon_that_does_not_end_is_named(stand_in, monkeypatch, capsys):
    with gpu_environments(["0"], 2) as ((environment),):
        (stand_in.folder / "deaf").touch()
        monkeypatch.setattr(mps, "_PATIENCE", 0.5)
    pipes = environment["CUDA_MPS_PIPE_DIRECTORY"]
    end = f"warning: MPS still runs; end it by `echo quit | CUDA_MPS_PIPE_DIRECTORY={pipes} {mps.PROGRAM}`"
    assert capsys.readouterr().err.splitlines()[1:] == [end]
    (stand_in.folder / "deaf").unlink()
    subprocess.run(end.split("`")[1], shell=True, check=True)
    while stand_in.left():
        time.sleep(0.02)
    shutil.rmtree(Path(pipes).parent)


LIBCUDA = """
#include <stdlib.h>
int cuInit(unsigned flags) { return getenv("CUDA_MPS_PIPE_DIRECTORY") ? REFUSED : 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return device; }
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no C compiler")
@pytest.mark.parametrize("refused", [0, 805])
def test_a_gpu_that_a_process_under_it_cannot_use_is_used_without_it(refused, stand_in, tmp_path, monkeypatch, capsys):
    code = LIBCUDA.replace("REFUSED", str(refused)).encode()
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-x", "c", "-o", library, "-"], input=code, check=True)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setattr(mps, "_CLIENT", CLIENT)
    with gpu_environments(["0"], 2) as (environment,):
        assert ("CUDA_MPS_PIPE_DIRECTORY" in environment) == (refused == 0)
        assert len(stand_in.left()) == (refused == 0), "the daemon has ended again"
    said = capsys.readouterr().err
    assert refused == 0 or said == without(
        "a process under it gets CUDA's error 805; see `nvidia-smi -q -d COMPUTE` for the GPU's compute mode\n"
    )


TABLE = """
import signal, sys
from mdistiller.commands import table
from mdistiller.experiments import launch, mps
from mdistiller.experiments.processes import Task

mps._PLACE, mps._CLIENT = "/none", ""

def task(job):
    code = "import time; print('up', flush=True); time.sleep(600)"
    return Task([sys.executable, "-c", code], ".", {}, (job.folder / "train.log").absolute())

launch.task = task
# A shell that starts the tests in the background has them ignore SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
table.main([sys.argv[1], "--jobs", "2", "LOG.PREFIX", sys.argv[2]])
"""
PLAN = """
title: A few digits
seeds: [0, 1, 2]
overrides: {LOG.WANDB: false}
methods:
  student: {config: configs/digits/vanilla.yaml}
"""


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_table_ends_it(sent, stand_in, tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN)
    process = subprocess.Popen(
        [sys.executable, "-c", TABLE, tmp_path / "plan.yaml", tmp_path / "out"], cwd=REPOSITORY, text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "0", "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    while len([log for log in (tmp_path / "out").rglob("train.log") if "up" in log.read_text()]) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    assert len(stand_in.left()) == 1
    os.killpg(process.pid, sent) if sent == signal.SIGINT else process.send_signal(sent)  # Ctrl-C is for the group
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "share 1 GPU(s) through NVIDIA's MPS, which was started for them" in said
    assert said.endswith("interrupted; the same command continues with the missing runs\n")
    assert len(stand_in.calls("quit")) == 1 and stand_in.left() == []
    ((_, _, pipes, _),) = stand_in.calls("-d")
    assert not Path(pipes).parent.exists()


def test_a_signal_while_it_ends_is_received_afterwards(stand_in):
    class Asked(Exception):
        pass

    def ask(number, frame):
        raise Asked

    before = signal.signal(signal.SIGTERM, ask)
    try:
        with pytest.raises(Asked), gpu_environments(["0"], 2):
            control = stand_in.folder / mps.PROGRAM
            # The program itself sends it, when it is told to quit.
            control.write_text(STAND_IN.replace("*)\n", f"*)\n    kill -TERM {os.getpid()}\n", 1))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stand_in.left() == []
