"""tools/table.py: real runs of tools/train.py on a few digits, one that fails, and an interruption."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mdistiller.experiments.plan import read_plan
from tests.experiments.hand_made import write_run

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


def test_a_run_with_another_configuration_is_reported_and_kept(plan, finished, table, capsys):
    config = finished[1] / "config.yaml"
    config.write_text(config.read_text().replace("LR: 0.05", "LR: 0.06"))
    before = {p: p.read_bytes() for p in finished[1].iterdir()}
    assert table(plan, "--only", "student, seed 1", "--no-run") == 2
    assert "holds a run with SOLVER.LR 0.06 where the plan says 0.05" in capsys.readouterr().err
    assert table(plan, "--only", "student, seed 1") == 2, "reported, and not trained over"
    assert {p: p.read_bytes() for p in finished[1].iterdir()} == before
