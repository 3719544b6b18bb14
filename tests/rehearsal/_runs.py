"""Runs on the fake GPU, by way of the command's own functions, and where the host waited in them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mdistiller.engine.build import build_trainer
from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.meters import Meters
from mdistiller.engine.trainer import BaseTrainer

from .._networks import write_untrained
from ._fake_gpu import FakeGPU, Wait

REPOSITORY = Path(__file__).resolve().parents[2]
# The first two steps of an epoch check what may have changed before it.
FIRST = 2


@dataclass
class Waits:
    """Where the host waited in a run.

    Attributes:
        start: up to the end of the run's second step.
        steps: in each epoch from the end of its second step to the end of its last: what comes once a step.
        epochs: in all other places: what comes once an epoch.
    """

    start: list[Wait] = field(default_factory=list)
    steps: list[Wait] = field(default_factory=list)
    epochs: list[Wait] = field(default_factory=list)


def trainer_for(folder: Path, method: str, teacher: str, student: str, *overrides: Any) -> BaseTrainer:
    """The trainer of a run on a few of the embedded images, five steps an epoch; call it on the fake GPU."""
    write_untrained(folder / teacher, teacher, seed=1)
    settings = {
        "LOG.WANDB": False, "LOG.PREFIX": folder, "EXPERIMENT.DEVICE": "cuda", "EXPERIMENT.SEED": 0,
        "DISTILLER.TYPE": method, "DISTILLER.TEACHER": teacher, "DISTILLER.TEACHER_CKPT": folder / teacher,
        "DISTILLER.STUDENT": student, "DATASET.TRAIN_FRACTION": 0.03, "SOLVER.BATCH_SIZE": 8, "SOLVER.EPOCHS": 2,
        "DATASET.TEST.BATCH_SIZE": 64, "CRD.NCE.K": 16, "DCGD.GROUPS": REPOSITORY / "configs/digits/groups.json",
        "SOLVER.CUDA_GRAPH": "never",  # a fake GPU records none
    }  # fmt: skip
    given = [str(word) for pair in settings.items() for word in pair] + list(map(str, overrides))
    return build_trainer(load_cfg(REPOSITORY / "configs/digits/vanilla.yaml", given))


def step_waits(gpu: FakeGPU, trainer: BaseTrainer, steps: int = 3, epoch: int = 1) -> list[Wait]:
    """Take the first `steps` of an epoch, below 1 of a stage before training; the waits after the first ones."""
    trainer._turn_to(epoch)
    trainer.distiller.train()
    trainer.train_loader.set_epoch(1)
    meters = Meters()
    for number, batch in enumerate(trainer.train_loader, start=1):
        trainer.train_iter(trainer.prepare_batch(batch, 1), 1, meters, step=number)
        if number <= FIRST:
            gpu.waits.clear()
        if number == steps:
            break
    return gpu.waits


def run_waits(gpu: FakeGPU, trainer: BaseTrainer) -> Waits:
    """Train to the end, with validation and checkpoints."""
    waits, taken = Waits(), 0
    last = len(trainer.train_loader)
    train_iter = trainer.train_iter

    def move(to: Iterable[list[Wait]]) -> None:
        for target in to:
            target.extend(gpu.waits)
        gpu.waits.clear()

    def watched(*args: Any, **options: Any) -> None:
        nonlocal taken
        train_iter(*args, **options)
        number = taken % last + 1
        taken += 1
        move([waits.start if taken <= FIRST else waits.epochs if number <= FIRST else waits.steps])

    trainer.train_iter = watched  # type: ignore[method-assign]
    trainer.train()
    move([waits.epochs])
    return waits
