"""worklog.txt and metrics.csv: resumed, cut short, damaged."""

import csv
import re

import pytest

from mdistiller.engine.logs.log_files import MetricsCsv, Worklog

METRICS = {"lr": 0.0005, "train_acc": 1.0, "train_loss": 2.0, "test_acc": 3.0, "test_acc_top5": 4.0, "test_loss": 5.0}


def test_resuming_drops_the_rows_that_will_be_run_again(tmp_path):
    csv = MetricsCsv(tmp_path, 1)
    for epoch in (1, 2, 3):
        csv.epoch(epoch, METRICS)
    MetricsCsv(tmp_path, 3).epoch(3, {**METRICS, "train_acc": 9.0})
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines == [
        "epoch,lr,train_acc,train_loss,test_acc,test_acc_top5,test_loss",
        "1,0.0005,1,2,3,4,5", "2,0.0005,1,2,3,4,5", "3,0.0005,9,2,3,4,5",
    ]  # fmt: skip


def test_the_worklog_continues_when_resumed_and_is_new_otherwise(tmp_path):
    Worklog(tmp_path, 1).epoch(1, METRICS)
    Worklog(tmp_path, 2).epoch(2, METRICS)
    assert (tmp_path / "worklog.txt").read_text().count("lr: 0.0005") == 2
    Worklog(tmp_path, 1)
    assert not (tmp_path / "worklog.txt").exists()


def logged(folder, epochs, start=1, **changed):
    """The two files after a run that begins with epoch `start` has logged `epochs`."""
    worklog, metrics = Worklog(folder, start), MetricsCsv(folder, start)
    for epoch in epochs:
        worklog.epoch(epoch, {**METRICS, "test_acc": float(epoch), **changed})
        metrics.epoch(epoch, {**METRICS, "test_acc": float(epoch), **changed})
    return both(folder)


def both(folder):
    paths = [folder / "worklog.txt", folder / "metrics.csv"]
    return [path.read_bytes() if path.exists() else b"" for path in paths]


def test_cut_at_any_byte_by_a_kill_the_files_of_a_resumed_run_equal_those_of_one_never_stopped(tmp_path):
    whole, start = tmp_path / "whole", tmp_path / "three"
    whole.mkdir(), start.mkdir()
    uninterrupted = logged(whole, (1, 2, 3, 4))
    written = logged(start, (1, 2, 3))
    for resume_at in (2, 3):
        # The kill came at some byte while epoch `resume_at` or a later one was written.
        done = [len(content) for content in logged_to(tmp_path / f"to{resume_at}", resume_at)]
        for cut in range(0, 240, 7):
            folder = tmp_path / f"cut{resume_at}_{cut}"
            folder.mkdir()
            for name, content, kept in zip(("worklog.txt", "metrics.csv"), written, done):
                (folder / name).write_bytes(content[: kept + cut])
            assert logged(folder, range(resume_at, 5), start=resume_at) == uninterrupted


def logged_to(folder, epoch):
    folder.mkdir()
    return logged(folder, range(1, epoch))


@pytest.mark.parametrize("garbage", [b"\0" * 500, b"\xff\xfe broken \r\r\n\"", b"3,0.1\r\n", b"9" * 5000])
def test_garbage_is_dropped_and_the_rows_are_kept(tmp_path, garbage):
    good = logged(tmp_path, (1, 2))
    for name in ("worklog.txt", "metrics.csv"):
        with (tmp_path / name).open("ab") as file:
            file.write(garbage)
    assert logged(tmp_path, (), start=3) == good


def test_a_finished_run_that_is_trained_further_has_one_summary(tmp_path):
    logged(tmp_path, (1, 2))
    Worklog(tmp_path, 3).finish({"best_acc": 2.0, "last_acc": 2.0})
    logged(tmp_path, (3,), start=3)
    Worklog(tmp_path, 4).finish({"best_acc": 3.0, "last_acc": 3.0})
    text = (tmp_path / "worklog.txt").read_text()
    assert text.endswith("-" * 25 + "\nbest_acc\t3.00\nlast_acc\t3.00\n") and text.count("best_acc") == 1
    assert re.findall(r"epoch: (\d)", text) == ["1", "2", "3"]


def test_a_metric_that_first_appears_later_gets_a_column(tmp_path):
    logged(tmp_path, (1,))
    logged(tmp_path, (2,), start=2, ema_acc=7.0)
    logged(tmp_path, (3,), start=3)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [(row["epoch"], row["ema_acc"]) for row in rows] == [("1", ""), ("2", "7"), ("3", "")]
