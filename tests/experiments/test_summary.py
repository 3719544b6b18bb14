"""From hand-made runs to the table: every value against a literal."""

import csv
import json

import pytest

from mdistiller.analysis.plots.bars import bars_figure
from mdistiller.errors import UserError
from mdistiller.experiments.plan import read_plan
from mdistiller.experiments.summary import load_table, save_table, summarise
from mdistiller.experiments.table_text import table_cells, table_markdown, write_csv

PLAN = """
title: By hand
about: Nothing was trained.
seeds: [0, 1, 2]
overrides: {SOLVER.EPOCHS: 2, LOG.PREFIX: HERE}
methods:
  student: {config: configs/digits/vanilla.yaml}
  KD: {config: configs/digits/kd.yaml, published: 70.66, source: crd}
  DKD: {config: configs/digits/dkd.yaml}
  DCGD_KD: {config: configs/digits/dcgd_kd.yaml}
sources: {crd: "Tian et al. 2020, arXiv 1910.10699", unused: "somebody else"}
"""


@pytest.fixture
def plan(tmp_path, make_run):
    """Three finished runs of KD, one of the student, a half-finished one of DCGD_KD, none of DKD."""
    (tmp_path / "hand.yaml").write_text(PLAN.replace("HERE", str(tmp_path)))
    plan = read_plan(tmp_path / "hand.yaml")

    def run(method, seed, accuracies, heads=()):
        job = plan.jobs("", method)[seed]
        row = {"epoch_seconds": 3 + seed, "peak_memory_mib": 100 + seed}
        rows = [{"test_acc": a, **row, **{f"test_acc_head_{h}": a + d for h, d in heads}} for a in accuracies]
        make_run("", rows, *job.overrides, config=job.config, folder=job.folder)

    for seed, accuracies in enumerate([(61, 60), (50, 61), (64, 63.5)]):
        run("KD", seed, accuracies)
    run("student", 1, (50, 58))
    run("DCGD_KD", 0, (60, 62), [("grouped", 0), ("single", -2)])
    run("DCGD_KD", 1, (60,), [("grouped", 0), ("single", -2)])
    return plan


def test_means_spreads_gains_and_costs_by_hand(plan):
    table = summarise(plan)
    student, kd, dkd, grouped, single = table.rows
    # last 60, 61, 63.5: mean 61.5, deviations -1.5, -0.5, 2, so the variance is (2.25 + 0.25 + 4) / 2
    assert (kd.runs, kd.planned, kd.last, kd.last_sd) == (3, 3, 61.5, pytest.approx(3.25**0.5, rel=1e-12))
    assert (kd.best, kd.best_sd) == (62.0, pytest.approx(3**0.5, rel=1e-12))  # best 61, 61, 64
    assert (kd.published, kd.source, kd.gains) == (70.66, "crd", {"KD": None, "student": 3.5})
    assert (kd.seconds, kd.epoch_seconds, kd.peak_memory_mib) == (8.0, 4.0, 102.0)
    assert (kd.parameters, kd.extra_parameters) == (78042, 0) and round(kd.macs / 1e6, 1) == 12.5
    assert (student.runs, student.last, student.last_sd) == (1, 58.0, None)
    assert student.gains == {"KD": -3.5, "student": None}
    assert (dkd.runs, dkd.planned, dkd.last, dkd.gains) == (0, 3, None, {"KD": None, "student": None})
    assert (grouped.method, grouped.runs, grouped.last) == ("DCGD_KD, head: grouped", 1, 62.0)
    assert (single.method, single.last, single.gains["KD"]) == ("DCGD_KD, head: single", 60.0, -1.5)
    assert grouped.parameters > single.parameters == 78042
    assert [len(row.folders) for row in table.rows] == [1, 3, 0, 1, 1]


def test_the_markdown_table_is_complete(plan):
    text = table_markdown(summarise(plan))
    lines = text.splitlines()
    assert lines[0] == "# By hand" and "Nothing was trained." in text
    (kd,) = (line for line in lines if line.startswith("| KD "))
    assert [cell.strip() for cell in kd.strip("|").split("|")] == [
        "KD", "3", "61.50 ± 1.80", "62.00 ± 1.73", "70.66 (crd)", "-", "+3.50", "8 s", "4.0", "102", "78,042", "0",
        "12.5 M",
    ]  # fmt: skip
    (dkd,) = (line for line in lines if line.startswith("| DKD "))
    assert "0 of 3" in dkd
    assert "(crd) Tian et al. 2020, arXiv 1910.10699" in text and "somebody else" not in text
    assert "5 run(s) on a slide rule, 1 thread(s), torch 0.1, code 0123456789abcd-dirty, 2" in text


def test_columns_without_a_value_are_left_out(plan):
    del plan.methods["KD"].published[""]
    columns, _ = table_cells(summarise(plan), "")
    assert "published" not in columns and "over KD" in columns


def test_the_csv_holds_unrounded_values(plan, tmp_path):
    write_csv(summarise(plan), tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="") as file:
        student, kd, dkd, *_ = csv.DictReader(file)
    assert [kd[c] for c in ("method", "last", "best", "over_student", "over_KD")] == ["KD", "61.5", "62.0", "3.5", ""]
    assert float(kd["last_sd"]) == pytest.approx(3.25**0.5, rel=1e-15)
    assert (student["last_sd"], dkd["last"], dkd["planned"]) == ("", "", "3")
    assert len(kd["folders"].split(";")) == 3


def test_the_table_is_read_back_as_it_was(plan, tmp_path):
    table = summarise(plan)
    save_table(table, tmp_path / "table.json")
    read = load_table(tmp_path / "table.json")
    assert table_markdown(read) == table_markdown(table) and len(read.rows) == 5


@pytest.mark.parametrize("content", ["", "[]", '{"rows": 1}', '{"rows": []}', '{"rows": [{"x": 1}]}'])
def test_a_file_that_is_no_table_is_refused(tmp_path, content):
    (tmp_path / "table.json").write_text(content)
    with pytest.raises(UserError, match=r"table.json holds no table that tools/table.py wrote"):
        load_table(tmp_path / "table.json")
    with pytest.raises(UserError, match=r"no table at .*; tools/table.py writes one"):
        load_table(tmp_path / "none.json")


def test_bars_show_the_means_and_markers_the_published_values(plan):
    (ax,) = bars_figure(summarise(plan)).axes
    (bars, *_) = (c for c in ax.containers if hasattr(c, "patches"))
    assert [bar.get_width() for bar in bars] == [58, 61.5, 62, 60]
    assert [t.get_text() for t in ax.get_yticklabels()] == [
        "student", "KD", "DCGD_KD, head: grouped", "DCGD_KD, head: single"
    ]  # fmt: skip
    whiskers = bars.errorbar.lines[2][0].get_segments()
    assert whiskers[1][:, 0] == pytest.approx([61.5 - 3.25**0.5, 61.5 + 3.25**0.5])
    (published,) = (line for line in ax.lines if line.get_label() == "published")
    assert (published.get_xdata()[0], published.get_ydata()[0]) == (70.66, 1)
    assert f"the axis starts at {ax.get_xlim()[0]:g}" in ax.get_xlabel() and "(%)" in ax.get_xlabel()


def test_a_plan_without_a_finished_run_gets_a_one_line_error(tmp_path):
    (tmp_path / "hand.yaml").write_text(PLAN.replace("HERE", str(tmp_path / "empty")))
    with pytest.raises(UserError, match="no run of plan hand has ended yet"):
        summarise(read_plan(tmp_path / "hand.yaml"))


def test_every_measured_value_comes_from_the_runs(plan):
    """A changed value in metrics.csv changes that value of the table, and no other."""
    before = json.dumps([row.last for row in summarise(plan).rows])
    file = plan.jobs("", "student")[1].folder / "metrics.csv"
    file.write_text(file.read_text().replace("58", "59.5"))
    assert before.replace("58.0", "59.5") == json.dumps([row.last for row in summarise(plan).rows])
