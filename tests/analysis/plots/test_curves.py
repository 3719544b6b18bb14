"""Curves: which lines are drawn from which columns."""

import math

import pytest
from PIL import Image

from mdistiller.analysis.plots.curves import curves_figure, draw_run
from mdistiller.experiments.runs import read_run

KD = [{"lr": 0.1, "train_acc": 9, "test_acc": 10, "train_loss": 5, "loss/loss_ce": 2, "loss/loss_kd": 3},
      {"lr": 0.01, "train_acc": 21, "test_acc": 20, "train_loss": 4, "loss/loss_ce": 1.5, "loss/loss_kd": 2.5}]
PLAIN = [{"lr": 0.1, "train_acc": 8, "test_acc": 11, "train_loss": 2.5, "loss/ce": 2.5}]


def lines(figure):
    """{axis label: {line label: [y, ...]}}"""
    return {
        ax.get_ylabel(): {line.get_label(): list(line.get_ydata()) for line in ax.lines}
        for ax in figure.axes
        if ax.get_visible()
    }


def test_several_runs_have_a_panel_for_accuracy_total_loss_and_each_loss_term(make_run):
    runs = {"KD": read_run(make_run("kd", KD)), "plain": read_run(make_run("plain", PLAIN))}
    assert lines(curves_figure(runs)) == {
        "test top-1 (%)": {"KD": [10, 20], "plain": [11]},
        "training loss, sum of its terms (nats)": {"KD": [5, 4], "plain": [2.5]},
        "loss term ce, weighted (nats)": {"KD": [2, 1.5], "plain": [2.5]},
        "loss term kd, weighted (no unit)": {"KD": [3, 2.5]},
    }


def test_a_single_run_has_panels_for_accuracy_losses_and_learning_rate(make_run):
    figure = curves_figure({"KD": read_run(make_run("kd", KD))})
    assert lines(figure) == {
        "top-1 accuracy (%)": {"test": [10, 20], "training": [9, 21]},
        "training loss, weighted (ce in nats)": {"all terms": [5, 4], "ce": [2, 1.5], "kd": [3, 2.5]},
        "learning rate": {"learning rate": [0.1, 0.01]},
    }
    assert all(ax.get_xlabel() == "epoch" for ax in figure.axes)


def test_every_head_has_a_line_and_missing_columns_have_none(make_run):
    rows = [{"test_acc": 5, "test_acc_head_grouped": 5, "test_acc_head_single": 4}]
    drawn = lines(curves_figure({"": read_run(make_run("dcgd", rows))}))
    assert drawn == {"top-1 accuracy (%)": {"test, grouped head": [5], "test, single head": [4]}}


def test_an_epoch_without_a_value_leaves_a_gap(make_run):
    drawn = lines(curves_figure({"": read_run(make_run("a", [{"test_acc": 1, "lr": ""}, {"test_acc": 2, "lr": 0.5}]))}))
    first, second = drawn["learning rate"]["learning rate"]
    assert math.isnan(first) and second == 0.5


def test_more_runs_than_colours_still_differ(make_run):
    runs = {str(i): read_run(make_run(str(i), PLAIN)) for i in range(16)}
    figure = curves_figure(runs)
    looks = [(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines]
    assert len(looks) == len(set(looks)) == 16
    assert figure.legends and not any(ax.get_legend() for ax in figure.axes), "one legend, outside the data"


def test_a_finished_run_gets_a_plot(make_run):
    folder = make_run("kd", KD)
    assert draw_run(folder) == folder / "curves.png"
    with Image.open(folder / "curves.png") as plot:
        assert plot.size == (2250, 630)


@pytest.mark.parametrize("damage", ["metrics.csv", "config.yaml", "curves.png"])
def test_a_plot_that_fails_is_a_one_line_warning_and_no_error(make_run, damage, capsys):
    folder = make_run("kd", KD)
    (folder / damage).unlink(missing_ok=True)
    if damage == "curves.png":
        (folder / damage).mkdir()
    assert draw_run(folder) is None
    said = capsys.readouterr().err
    assert said.startswith(f"warning: no {folder}/curves.png (") and said.count("\n") == 1
