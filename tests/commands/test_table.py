"""tools/table.py: real runs of tools/train.py on a few digits, one that fails, and an interruption."""

import argparse
import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mdistiller.commands import table as table_command
from mdistiller.experiments import launch
from mdistiller.experiments.plan import read_plan
from mdistiller.experiments.processes import Task
from mdistiller.system import process_start
from tests._networks import write_untrained
from tests.experiments.hand_made import write_run
from tests.experiments.test_mps import StandIn
from tests.reliability.runs import timeless, unequal

REPOSITORY = Path(__file__).resolve().parents[2]

PLAN = """
title: A few digits
seeds: [0, 1]
overrides: {{DATASET.TRAIN_FRACTION: 0.03, SOLVER.EPOCHS: 3, LOG.WANDB: false, LOG.PREFIX: {here}}}
methods:
  student: {{config: configs/digits/vanilla.yaml}}
  broken: {{config: configs/digits/kd.yaml, overrides: {{DISTILLER.TEACHER_CKPT: no/such/teacher}}}}
over: [student]
"""  # fmt: skip


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "few.yaml").write_text(PLAN.format(here=tmp_path))
    return tmp_path / "few.yaml"


@pytest.fixture
def finished(plan):
    """The folders of the student's two runs, made by hand: 10 and 13 % at the end."""
    jobs = read_plan(plan).jobs("", "student")
    for job, last in zip(jobs, (10, 13)):
        rows = [{"test_acc": 5, "epoch_seconds": 1}] * 2 + [{"test_acc": last, "epoch_seconds": 1}]
        write_run(job.folder, rows, *job.overrides, config=job.config)
    return [job.folder for job in jobs]


@pytest.fixture
def table(tool, monkeypatch):
    """tools/table.py in this process; returns its exit status."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(*arguments):
        try:
            tool("table.py", *arguments)
        except SystemExit as stopped:
            return stopped.code
        return 0

    before = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, before)


def rows_of(metrics):
    return metrics.read_text().splitlines()[1:] if metrics.exists() else []


def test_an_interrupted_plan_continues_and_a_failure_stops_no_other_run(plan, table, capsys):
    folder = plan.parent / "plan_few"
    process = subprocess.Popen(
        [sys.executable, "tools/table.py", plan, "--jobs", "2"], cwd=REPOSITORY, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while not any(rows_of(metrics) for metrics in folder.glob("student*/metrics.csv")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130 and "interrupted; the same command continues with the missing runs" in said

    assert table(plan, "--jobs", "2", "--only", "student|seed 0") == 1
    said = capsys.readouterr()
    assert "failed: broken, seed 0: error: no checkpoint of wrn_16_2 at no/such/teacher" in said.err
    assert said.err.endswith("1 run(s) failed: broken, seed 0\n")
    assert "| student |" in said.out and "wrote " in said.out
    for metrics in folder.glob("student*/metrics.csv"):
        assert [row.split(",")[0] for row in rows_of(metrics)] == list("123"), "every epoch once"
    assert {p.name for p in folder.glob("table.*")} == {"table.md", "table.csv", "table.json", "table.png"}


def test_an_interrupt_between_two_outcomes_ends_the_other_runs(plan, monkeypatch):
    first, other = read_plan(plan).jobs("", "student")
    log = other.folder / "train.log"
    waits = f"while not glob.glob({str(log)!r}) or not os.stat({str(log)!r}).st_size: time.sleep(0.02)"
    code = {first.folder: waits, other.folder: "print(os.getpid(), flush=True); time.sleep(600)"}

    def task(job):
        command = [sys.executable, "-c", f"import glob, os, time\n{code[job.folder]}"]
        return Task(command, ".", {}, job.folder / "train.log")

    monkeypatch.setattr(launch, "task", task)
    left = []

    def interrupted(job):
        left.append(job)
        if len(left) > 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(table_command, "finished_run", interrupted)
    arguments = argparse.Namespace(dry_run=False, ray=None, jobs=2)
    with pytest.raises(KeyboardInterrupt) as kept:  # and with it the frames in which the runs were
        table_command.run([first, other], arguments, {})
    assert kept.value and process_start(int(log.read_text())) is None


def test_finished_runs_are_not_repeated_and_fill_the_table(plan, finished, table, capsys):
    before = {p: p.stat().st_mtime_ns for folder in finished for p in folder.iterdir()}
    assert table(plan, "--only", "student") == 0
    assert {p: p.stat().st_mtime_ns for folder in finished for p in folder.iterdir()} == before
    with (plan.parent / "plan_few/table.csv").open() as file:
        student, broken = csv.DictReader(file)
    assert (student["runs"], student["last"]) == ("2", "11.5")
    assert float(student["last_sd"]) == pytest.approx(4.5**0.5)  # deviations 1.5 and 1.5
    assert (broken["runs"], broken["last"]) == ("0", "")
    assert "seed" not in capsys.readouterr().out, "nothing was run"


def test_a_dry_run_lists_the_commands_of_the_missing_runs(plan, finished, table, capsys):
    assert table(plan, "--dry-run") == 0
    assert capsys.readouterr().out.count("configs/digits/kd.yaml") == 2, "the student's are done"
    assert table(plan, "--dry-run", "SOLVER.LR", "0.1") == 0
    commands = capsys.readouterr().out.splitlines()
    assert len(commands) == 4 and all(c.startswith("python ") and "SOLVER.LR 0.1" in c for c in commands)
    assert "configs/digits/vanilla.yaml" in commands[0] and commands[0].endswith("EXPERIMENT.SEED 0")


BAD = {
    "no plan": (["none.yaml"], "cannot read plan none.yaml"),
    "nothing chosen": (["PLAN", "--only", "DKD"], "--only 'DKD' matches no run; the first run is 'student, seed 0'"),
    "unknown key": (["PLAN", "SOLVER.EPOCH", "1"], "did you mean SOLVER.EPOCHS"),
    "no run yet": (["PLAN", "--no-run", "SOLVER.LR", "0.7"], "no run of plan few has ended yet"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_a_one_line_error(case, plan, table, capsys):
    arguments, message = BAD[case]
    assert table(*(plan if a == "PLAN" else a for a in arguments)) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("error: ") and said.count("\n") == 1


def test_jobs_and_ray_together_are_refused(plan, table, capsys):
    assert table(plan, "--ray", "local", "--jobs", "2") == 2
    assert "--jobs is for this machine; with --ray the cluster runs one for each GPU" in capsys.readouterr().err


SEEDS = """
title: A few digits
seeds: [0, 1, 2]
overrides: {{DATASET.TRAIN_FRACTION: 0.1, SOLVER.EPOCHS: 1, LOG.WANDB: false, DISTILLER.TEACHER: resnet8,
  DISTILLER.TEACHER_CKPT: {here}/teacher, EXPERIMENT.DETERMINISTIC: true}}
methods:
  KD: {{config: configs/digits/kd.yaml}}
"""


@pytest.mark.slow
def test_deterministic_runs_that_share_a_gpu_have_the_same_bits_as_alone(tmp_path):
    """Without a GPU it is only a name, MPS is a stand-in, and the runs are on the CPU, with all of its cores."""
    write_untrained(tmp_path / "teacher", "resnet8", seed=0)
    (tmp_path / "few.yaml").write_text(SEEDS.format(here=tmp_path))
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["OMP_WAIT_POLICY"] = "PASSIVE"  # alone, too: spinning threads are slow beside others
    environment["CUDA_VISIBLE_DEVICES"] = (launch.visible_gpus() or "0")[0]
    mps = None if torch.cuda.is_available() else StandIn(tmp_path / "bin")
    if mps:
        environment["PATH"] = f"{mps.folder}:{os.environ['PATH']}"
        environment["CUDA_MPS_PIPE_DIRECTORY"] = str(tmp_path / "none")

    def run(*command):
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        return done

    table = sys.executable, "tools/table.py", tmp_path / "few.yaml"
    said = run(*table, "--jobs", "3", "LOG.PREFIX", tmp_path / "together").stderr
    if mps:
        assert "note: 3 runs at a time share 1 GPU(s) through NVIDIA's MPS, which was started for them" in said
        assert [command for command, *_ in mps.calls("-d", "quit")] == ["-d", "quit"] and mps.left() == []
    for line in run(*table, "--dry-run", "LOG.PREFIX", tmp_path / "alone").stdout.splitlines():
        run(sys.executable, *shlex.split(line)[1:])
    together, alone = (sorted((tmp_path / name / "plan_few").glob("KD*")) for name in ("together", "alone"))
    assert len(together) == 3 and [one.name for one in together] == [one.name for one in alone]
    for one, other in zip(together, alone):
        weights = (torch.load(folder / "student_latest", weights_only=True) for folder in (one, other))
        assert unequal(*weights) == []
        assert timeless(one / "metrics.csv") == timeless(other / "metrics.csv")
        threads = {json.loads((folder / "environment.json").read_text())["threads"] for folder in (one, other)}
        assert len(threads) == 1


def test_a_run_with_another_configuration_is_reported_and_kept(plan, finished, table, capsys):
    config = finished[1] / "config.yaml"
    config.write_text(config.read_text().replace("LR: 0.05", "LR: 0.06"))
    before = {p: p.read_bytes() for p in finished[1].iterdir()}
    assert table(plan, "--only", "student, seed 1", "--no-run") == 2
    assert "holds a run with SOLVER.LR 0.06 where the plan says 0.05" in capsys.readouterr().err
    assert table(plan, "--only", "student, seed 1") == 2, "reported, and not trained over"
    assert {p: p.read_bytes() for p in finished[1].iterdir()} == before
