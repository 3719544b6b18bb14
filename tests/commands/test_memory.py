"""Memory that runs out in a run: one line, exit status 2, and a table goes on with the other runs."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn as nn

from mdistiller.commands import train
from mdistiller.distillers import Distiller, distiller_dict
from mdistiller.engine.runtime.device import pick_device
from tests._networks import write_untrained

from .conftest import REPOSITORY, tiny_config

CONFIG = tiny_config("Large")


class Large(Distiller):
    """A method whose step needs a petabyte."""

    needs_teacher = False

    def __init__(self, student, teacher, cfg):
        super().__init__(student, nn.Identity())

    def forward_train(self, image, target, **kwargs):
        self.step()
        raise AssertionError

    def step(self):
        torch.empty(10**15)


def gpu_is_full(self=None):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")


@pytest.mark.parametrize("step", [Large.step, gpu_is_full])
def test_a_step_without_memory_is_one_line(step, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(distiller_dict, "Large", Large)
    monkeypatch.setattr(Large, "step", step)
    (tmp_path / "large.yaml").write_text(CONFIG)
    with pytest.raises(SystemExit) as stopped:
        train.main(["--cfg", "large.yaml"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and last.startswith("error: out of memory in test_memory.py, line ")
    assert "allocate 4000000000000000 bytes" in last or "Tried to allocate 2.00 MiB" in last


def test_a_full_gpu_is_not_taken_for_an_absent_one(monkeypatch):
    monkeypatch.setattr(torch, "ones", lambda *args, **kwargs: gpu_is_full())
    with pytest.raises(torch.OutOfMemoryError):
        pick_device("cuda")


PLAN = """
title: A few digits
seeds: [0]
overrides:
  DATASET.TRAIN_FRACTION: 0.1
  SOLVER.EPOCHS: 1
  LOG.WANDB: false
  LOG.PREFIX: {here}
  DISTILLER.TEACHER: resnet8
  DISTILLER.TEACHER_CKPT: {here}/teacher
methods:
  large:
    config: configs/digits/kd.yaml
    overrides: {{DISTILLER.TYPE: CRD, SOLVER.TRAINER: crd, CRD.NCE.K: 16777216, EXPERIMENT.DEVICE: cpu}}
  student: {{config: configs/digits/vanilla.yaml}}
over: [student]
"""


@pytest.mark.slow
def test_a_run_that_runs_out_of_memory_fails_alone(tmp_path):
    """Under a real limit of 8 GB for each process, which 16,777,216 negatives for 64 images exceed."""
    write_untrained(tmp_path / "teacher", "resnet8", seed=0)
    (tmp_path / "few.yaml").write_text(PLAN.format(here=tmp_path))
    command = [sys.executable, "tools/table.py", str(tmp_path / "few.yaml"), "--jobs", "2"]
    done = subprocess.run(
        ["sh", "-c", 'ulimit -v 8000000 && exec "$@"', "sh", *command], cwd=REPOSITORY, text=True, capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    failed = "failed: large, seed 0: error: out of memory in contrastive.py, line "
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("failed: ")]
    assert line.startswith(failed) and "--jobs" in line
    assert "[2/2] student, seed 0: top-1" in done.stdout or "[1/2] student, seed 0: top-1" in done.stdout
