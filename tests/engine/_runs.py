"""A run of the smallest network on 44 random images, in milliseconds, and what it leaves behind."""

import csv

import pytest
import torch
import torch.nn as nn

from mdistiller.dataset import ImageArray
from mdistiller.distillers import Distiller
from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.files.checkpoint import load_checkpoint
from mdistiller.engine.trainer import BaseTrainer

from .._networks import CLASSES, Net

BATCH, STEPS = 8, 6  # five full batches and one of four images


class Plain(Distiller):
    """Cross-entropy, and a penalty of the logits as the distillation loss, so that DOT has its two terms."""

    needs_teacher = False

    def __init__(self, student):
        super().__init__(student, nn.Identity())

    def forward_train(self, image, target, **kwargs):
        logits, _ = self.student(image)
        losses = {"loss_ce": nn.functional.cross_entropy(logits, target), "loss_kd": 0.1 * logits.square().mean()}
        return logits, losses


def loaders():
    images = torch.randint(0, 256, (44, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = ImageArray(images, torch.arange(44) % CLASSES, (0.5,) * 3, (0.25,) * 3)
    return data.loader(BATCH, 0, train=True, seed=0), data.loader(BATCH, 0, train=False)


def trainer_of(folder, *overrides, cls=BaseTrainer, name="run", distiller=None):
    """A trainer of `Plain`, or of `distiller`, over two epochs of `loaders()`, with its output in `folder`."""
    (folder / "empty.yaml").write_text("")
    quiet = ["LOG.WANDB", "False", "LOG.PREFIX", str(folder), "EXPERIMENT.DEVICE", "cpu"]
    schedule = ["SOLVER.BATCH_SIZE", str(BATCH), "SOLVER.EPOCHS", "2", "SOLVER.LR_DECAY_STAGES", "[1]"]
    cfg = load_cfg(folder / "empty.yaml", [*quiet, *schedule, *overrides])
    torch.manual_seed(0)
    return cls(name, distiller or Plain(Net()), *loaders(), cfg)


def rows_of(trainer):
    """The rows of metrics.csv."""
    with (trainer.log_path / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def student_of(trainer):
    """The weights of the student after the last epoch."""
    return load_checkpoint(trainer.log_path / "student_latest")["model"]


def stopped_and_resumed(folder, cls):
    """A run that is interrupted before its second epoch is logged, and resumed."""
    stopped = trainer_of(folder, cls=cls)
    stopped.log = Interrupted(stopped.log, calls=2)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = trainer_of(folder, cls=cls)
    resumed.train(resume=True)
    return resumed


class Interrupted:
    """A function that raises KeyboardInterrupt instead of its call number `calls`, from 1."""

    def __init__(self, function, calls):
        self.function, self.left = function, calls

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return self.function(*args, **kwargs)
