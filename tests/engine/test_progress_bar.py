"""The progress bar on a terminal."""

import io
import re
import sys
import time

import pytest
import torch

from mdistiller.engine import progress_bar
from mdistiller.engine.meters import Meters
from mdistiller.engine.progress_bar import ProgressBar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def meters():
    filled = Meters()
    filled.add(4, ("train_loss", "loss/loss_kd"), torch.tensor([8.0, 2.0], dtype=torch.float64))
    return filled


def test_the_bar_shows_rate_time_left_learning_rate_and_every_loss_term(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress_bar, "_REFRESH", 0.0)
    bar = ProgressBar(3, steps=10, done=4, shown=True)
    time.sleep(0.01)
    bar.update(0.05, meters(), images=64)
    bar.close()
    text = terminal.getvalue()
    for shown in ("epoch 3", "5/10", "lr=0.05", "train_loss=2", "loss_kd=0.5", "images/s="):
        assert shown in text, text
    assert re.search(r"\[\d\d:\d\d<", text), "time passed and time left"


@pytest.mark.parametrize("stream, shown", [(io.StringIO, True), (Terminal, False)])
def test_nothing_is_shown_in_a_file_or_by_another_rank(monkeypatch, stream, shown):
    out = stream()
    monkeypatch.setattr(sys, "stderr", out)
    bar = ProgressBar(1, 2, 0, shown)
    bar.update(0.1, meters(), 1)
    bar.close()
    assert out.getvalue() == ""
