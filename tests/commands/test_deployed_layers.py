"""Methods that deploy more than the student, through the tools as processes: eval prints what training logged."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .._networks import write_untrained

REPOSITORY = Path(__file__).resolve().parents[2]


def tool(folder, name, *arguments):
    done = subprocess.run(
        [sys.executable, REPOSITORY / "tools" / name, *map(str, arguments)],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}, text=True, timeout=240,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("method", ["SIMKD", "NORM"])
def test_eval_prints_the_accuracy_that_training_logged(method, tmp_path):
    teacher = write_untrained(tmp_path / "teacher", "wrn_16_1", seed=1)
    tool(
        tmp_path, "train.py", "--cfg", REPOSITORY / "configs/digits/vanilla.yaml", "LOG.PREFIX", "runs", "LOG.WANDB",
        "False", "EXPERIMENT.DEVICE", "cpu", "DATASET.TRAIN_FRACTION", "0.1", "SOLVER.EPOCHS", "2", "DISTILLER.TYPE",
        method, "DISTILLER.TEACHER", "wrn_16_1", "DISTILLER.TEACHER_CKPT", teacher, "NORM.N", "2",
    )  # fmt: skip
    (metrics,) = (tmp_path / "runs").rglob("metrics.csv")
    with metrics.open() as file:
        best = max(float(row["test_acc"]) for row in csv.DictReader(file))
    files = [metrics.parent / "student_best"]
    if method == "NORM":
        files.append(metrics.parent / "merged.safetensors")
        tool(tmp_path, "convert.py", *files, "--merge")
    for path in files:
        said = tool(tmp_path, "eval.py", "-c", path, "--device", "cpu")
        assert re.search(r"top-1 ([\d.]+)", said)[1] == f"{best:.2f}", said
