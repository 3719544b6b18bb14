"""Writers: what they write, and that a failing one never stops training."""

import os

from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.logger import Logger, MetricsCsv, Wandb, Worklog, build_logger

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


def test_the_worklog_goes_on_when_resumed_and_starts_anew_otherwise(tmp_path):
    Worklog(tmp_path, 1).epoch(1, METRICS)
    Worklog(tmp_path, 2).epoch(2, METRICS)
    assert (tmp_path / "worklog.txt").read_text().count("lr: 0.0005") == 2
    Worklog(tmp_path, 1)
    assert not (tmp_path / "worklog.txt").exists()


class Failing:
    def __init__(self):
        self.calls = 0

    def epoch(self, epoch, metrics):
        self.calls += 1
        raise ConnectionError("no route\nto host")


def test_a_failing_writer_is_dropped_with_one_line_and_the_others_go_on(tmp_path, capsys):
    failing = Failing()
    logger = Logger({"cloud": lambda: failing, "metrics.csv": lambda: MetricsCsv(tmp_path, 1)})
    logger.epoch(1, METRICS)
    logger.epoch(2, METRICS)
    assert failing.calls == 1 and len((tmp_path / "metrics.csv").read_text().splitlines()) == 3
    assert capsys.readouterr().err == (
        "warning: cloud is off from here on (ConnectionError: no route to host)\n"
    )


def test_a_writer_that_cannot_be_made_is_dropped_too(capsys):
    def make():
        raise ImportError("No module named 'cloud'")

    assert Logger({"cloud": make}).writers == {}
    assert "warning: cloud is off from here on (ImportError: No module named 'cloud')" in capsys.readouterr().err


def test_wandb_is_asked_for_by_default_and_left_out_when_off(tmp_path):
    names = [
        list(build_logger_names(tmp_path, *overrides)) for overrides in (["LOG.WANDB", "False"],)
    ]
    assert names == [["worklog.txt", "metrics.csv", "TensorBoard"]]
    assert load_cfg("configs/cifar100/kd.yaml").LOG.WANDB is True


def build_logger_names(folder, *overrides):
    logger = build_logger(folder, "p/n", load_cfg("configs/cifar100/kd.yaml", list(overrides)), 1)
    logger.finish({})
    return logger.writers


def test_wandb_without_a_key_goes_offline_without_asking(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb = Wandb(tmp_path, "project", "name", ["kd", "x" * 100, ""], {"a": 1})
    wandb.epoch(1, METRICS)
    wandb.finish({"best_acc": 3.0})
    assert any(name.startswith("offline-run-") for name in os.listdir(tmp_path / "wandb"))
    assert capfd.readouterr() == ("", "")
