"""Reading runs whose files have additional or missing content."""

import math

import pytest

from mdistiller.errors import UserError
from mdistiller.experiments.runs import read_run, read_runs


def test_unknown_columns_are_kept_and_missing_values_are_nan(make_run):
    run = read_run(make_run("a", [{"test_acc": 10, "grad_norm": ""}, {"test_acc": 20, "grad_norm": 3}]))
    assert run.columns == ["epoch", "test_acc", "grad_norm"]
    first, second = run.column("grad_norm")
    assert math.isnan(first) and second == 3.0
    assert all(math.isnan(value) for value in run.column("no such figure"))


def test_loss_terms_and_heads_have_short_names(make_run):
    rows = [{"test_acc": 50, "test_acc_head_grouped": 50, "test_acc_head_single": 45, "loss/loss_kd": 1, "loss/ce": 2}]
    run = read_run(make_run("a", rows))
    assert run.losses == {"kd": "loss/loss_kd", "ce": "loss/ce"}
    assert run.heads == {"grouped": "test_acc_head_grouped", "single": "test_acc_head_single"}
    assert read_run(make_run("b", [{"test_acc": 1}])).heads == {"": "test_acc"}


def test_a_run_is_finished_with_its_last_epoch(make_run):
    rows = [{"test_acc": 1}, {"test_acc": 2}]
    assert read_run(make_run("whole", rows, "SOLVER.EPOCHS", "2")).finished
    assert not read_run(make_run("half", rows, "SOLVER.EPOCHS", "3")).finished


def test_a_missing_or_broken_environment_is_no_error(make_run):
    folder = make_run("a", [{"test_acc": 1}])
    assert read_run(folder).environment["processor"] == "a slide rule"
    (folder / "environment.json").write_text("{half")
    assert read_run(folder).environment == {}


def test_a_half_written_line_is_refused(make_run):
    folder = make_run("a", [{"test_acc": 10, "lr": 1}])
    with (folder / "metrics.csv").open("a") as file:
        file.write("2,2")
    with pytest.raises(UserError, match=r"metrics.csv holds something that is not a number"):
        read_run(folder)


def test_runs_are_labelled_by_the_parts_of_their_names_that_differ(make_run):
    folders = [str(make_run(name, [{"test_acc": 1}])) for name in ("kd,res56,seed:0", "dkd,res56,seed:0")]
    assert list(read_runs(folders)) == ["kd", "dkd"]
    assert list(read_runs(folders[:1])) == ["kd,res56,seed:0"]
    assert list(read_runs([f"mine={folders[0]}", folders[1]])) == ["mine", "dkd,res56,seed:0"]
    with pytest.raises(UserError, match="two runs are called 'a'"):
        read_runs([f"a={folders[0]}", f"a={folders[1]}"])
    with pytest.raises(UserError, match="nowhere is no run's folder"):
        read_runs(["nowhere"])
