"""What the writers write, and that a failing writer never stops training."""

import re

import pytest

from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.logs.log_files import MetricsCsv
from mdistiller.engine.logs.logger import Logger, build_logger

from ..._processes import in_mount

METRICS = {"lr": 0.0005, "train_acc": 1.0, "train_loss": 2.0, "test_acc": 3.0, "test_acc_top5": 4.0, "test_loss": 5.0}


class Failing:
    def __init__(self):
        self.calls = 0

    def epoch(self, epoch, metrics):
        self.calls += 1
        raise ConnectionError("no route\nto host")


def test_a_failing_writer_is_dropped_with_one_line_and_the_others_continue(tmp_path, capsys):
    failing = Failing()
    logger = Logger({"cloud": lambda: failing, "metrics.csv": lambda: MetricsCsv(tmp_path, 1)})
    logger.epoch(1, METRICS)
    logger.epoch(2, METRICS)
    assert failing.calls == 1 and len((tmp_path / "metrics.csv").read_text().splitlines()) == 3
    assert capsys.readouterr().err == (
        "warning: cloud is off from here on (ConnectionError: no route to host)\n"
    )


def test_a_writer_that_cannot_be_created_is_dropped_too(capsys):
    def make():
        raise ImportError("No module named 'cloud'")

    assert Logger({"cloud": make}).writers == {}
    assert "warning: cloud is off from here on (ImportError: No module named 'cloud')" in capsys.readouterr().err


def test_wandb_is_on_by_default_and_left_out_when_off(tmp_path):
    names = [
        list(build_logger_names(tmp_path, *overrides)) for overrides in (["LOG.WANDB", "False"],)
    ]
    assert names == [["worklog.txt", "metrics.csv", "TensorBoard"]]
    assert load_cfg("configs/cifar100/kd.yaml").LOG.WANDB is True


def build_logger_names(folder, *overrides):
    logger = build_logger(folder, "p/n", load_cfg("configs/cifar100/kd.yaml", list(overrides)), 1)
    logger.finish({})
    return logger.writers


LIGHT = """
import os, sys
from pathlib import Path
from types import SimpleNamespace
from mdistiller.console import log_to_terminal
from mdistiller.engine.logs.logger import Wandb, build_logger
METRICS = {"lr": 0.0005, "train_acc": 1.0, "train_loss": 2.0, "test_acc": 3.0, "test_acc_top5": 4.0, "test_loss": 5.0}
METRICS |= {f"loss/{i}": 1.23456 for i in range(20)}
log_to_terminal()
"""

FULL_DISK = """
logger = build_logger(Path("."), "p/n", SimpleNamespace(LOG=SimpleNamespace(WANDB=False)), 1)
logger.epoch(1, METRICS)
with open("filler", "wb", buffering=0) as filler:
    try:
        while True:
            filler.write(b"0" * 1000)
    except OSError:
        pass
for epoch in range(2, 42):
    for step in range(20):
        logger.step(20 * epoch + step, {f"metric{i}": 1.0 for i in range(20)})
    logger.epoch(epoch, METRICS)
print("trained on with", *logger.writers)
os.remove("filler")
logger.epoch(42, METRICS)
logger.finish({})
print(Path("metrics.csv").read_text(), Path("worklog.txt").read_text())
"""


def test_a_full_disk_gives_one_warning_per_writer_and_the_lost_epochs_are_written_later(tmp_path):
    done = in_mount("60k", LIGHT + FULL_DISK, tmp_path)
    if done is None:
        pytest.skip("file systems cannot be mounted here")
    assert sorted(re.sub(r" \(.*", "", line) for line in done.stderr.splitlines()) == [
        "warning: TensorBoard is off from here on",
        "warning: metrics.csv cannot be written now, and is tried again each epoch",
        "warning: worklog.txt cannot be written now, and is tried again each epoch",
    ]
    first, *rest = done.stdout.splitlines()
    assert first == "trained on with worklog.txt metrics.csv"
    epochs = [str(epoch) for epoch in range(1, 43)]
    assert re.findall(r"^(\d+),", "\n".join(rest), re.MULTILINE) == epochs
    assert re.findall(r"^epoch: (\d+)$", "\n".join(rest), re.MULTILINE) == epochs


