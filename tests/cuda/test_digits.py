"""Students that learn scikit-learn's digits on the device, and score the same on the CPU."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

from mdistiller.commands.eval import evaluate_checkpoint
from mdistiller.engine.build import build_trainer
from mdistiller.engine.cfg import load_cfg

from ._runs import Result  # noqa: F401  # so that pytest rewrites its assertions

MODES = {
    "default": [],
    "bf16": ["SOLVER.AMP", "bf16"],
    "fp16": ["SOLVER.AMP", "fp16"],
    "EMA": ["SOLVER.EMA", "0.97"],
    "teacher cache": ["DISTILLER.TEACHER_CACHE", "{folder}/outputs"],
}
# On a CPU three seeds of the default end above 88 after these three epochs.
LEARNT = 85


def learnt(config: str, name: str, folder: Path, device: torch.device, *more: str) -> tuple[Path, float]:
    """The student's checkpoint after three epochs, and its accuracy; the EMA's, if that is lower."""
    settings = [
        "LOG.WANDB", "False", "LOG.PREFIX", str(folder), "EXPERIMENT.NAME", name, "EXPERIMENT.DEVICE", str(device),
        "SOLVER.EPOCHS", "3", "SOLVER.LR_DECAY_STAGES", "[2]", "SOLVER.BATCH_SIZE", "16",
        "DISTILLER.STUDENT", "resnet8", *more,
    ]  # fmt: skip
    trainer = build_trainer(load_cfg(config, settings))
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return trainer.log_path / "student_latest", min(trainer.state.last_acc.values())


def top1(ckpt: Path, device: str) -> float:
    found = re.search(r"top-1 ([\d.]+)", evaluate_checkpoint("resnet8", str(ckpt), "digits", 64, device=device))
    assert found is not None
    return float(found[1])


def test_students_learn_the_digits_in_every_mode_and_score_the_same_on_the_cpu(
    device: torch.device, tmp_path: Path
) -> None:
    pytest.importorskip("sklearn")
    teacher, reached = learnt("configs/digits/vanilla.yaml", "teacher", tmp_path, device)
    assert reached > LEARNT
    assert top1(teacher, str(device)) == pytest.approx(top1(teacher, "cpu"), abs=0.1)
    own = ["DISTILLER.TEACHER", "resnet8", "DISTILLER.TEACHER_CKPT", str(teacher)]
    accuracies = {}
    for mode, settings in MODES.items():
        more = [value.format(folder=tmp_path) for value in settings]
        _, accuracies[mode] = learnt("configs/digits/kd.yaml", mode, tmp_path, device, *own, *more)
    assert min(accuracies.values()) > LEARNT, accuracies
