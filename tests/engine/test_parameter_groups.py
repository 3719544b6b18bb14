"""Whole runs of a method that returns parameter groups: resumed, refused, and on two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from mdistiller.dataset import ImageArray
from mdistiller.distillers import Distiller
from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.files.checkpoint import load_checkpoint
from mdistiller.engine.trainer import trainer_dict
from mdistiller.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
CLASSES = 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, image):
        return self.fc(self.conv(image).mean((2, 3))), {}


class Heated(Distiller):
    """A trained temperature without weight decay, biases that learn slowly, and the rest, in one mixed list."""

    needs_teacher = False

    def __init__(self, student: nn.Module, grouped: bool) -> None:
        super().__init__(student, nn.Identity())
        self.grouped = grouped
        self.temperature = nn.Parameter(torch.tensor(4.0))

    def get_learnable_parameters(self):
        if not self.grouped:
            return [*self.student.parameters(), self.temperature]
        conv, fc = self.student.conv, self.student.fc
        slow = {"params": [conv.bias, fc.bias], "lr": 0.005}
        return [conv.weight, {"params": [self.temperature], "weight_decay": 0.0}, slow, fc.weight]

    def forward_train(self, image, target, **kwargs):
        logits, _ = self.student(image)
        return logits, {
            "loss_ce": F.cross_entropy(logits, target),
            "loss_heat": (logits / self.temperature).square().mean(),
        }


def data(count=24):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 8, 8, 3), generator=generator, dtype=torch.uint8)
    return ImageArray(images, torch.arange(count) % CLASSES, (0.5,) * 3, (0.25,) * 3)


def trainer_of(cfg, name="run", grouped=True, dtype=torch.float32):
    torch.manual_seed(0)
    loaders = data().loader(8, 0, train=True, seed=0), data().loader(8, 0, train=False)
    return trainer_dict[cfg.SOLVER.TRAINER](name, Heated(Net(), grouped).to(dtype), *loaders, cfg)


@pytest.fixture
def cfg_of(tmp_path):
    (tmp_path / "empty.yaml").write_text("")

    def make(*overrides):
        quiet = ["LOG.WANDB", "False", "LOG.PREFIX", str(tmp_path / "output"), "EXPERIMENT.DEVICE", "cpu"]
        schedule = ["SOLVER.EPOCHS", "4", "SOLVER.LR_DECAY_STAGES", "[1, 3]", "SOLVER.WARMUP_EPOCHS", "1"]
        return load_cfg(tmp_path / "empty.yaml", [*quiet, *schedule, *overrides])

    return make


@pytest.mark.parametrize("solver", [
    ("SOLVER.CLIP_GRAD_NORM", "0.5"), ("SOLVER.TYPE", "AdamW"), ("SOLVER.TRAINER", "dot"),
    ("SOLVER.TRAINER", "aligned"),
], ids=lambda solver: solver[1])  # fmt: skip
def test_a_resumed_run_with_groups_ends_like_one_that_was_never_stopped(cfg_of, solver):
    whole, interrupted = trainer_of(cfg_of(*solver), "whole"), trainer_of(cfg_of(*solver), "interrupted")
    whole.train()
    interrupted.begin()
    interrupted.cfg = cfg_of(*solver, "SOLVER.EPOCHS", "2")
    interrupted.train()
    resumed = trainer_of(cfg_of(*solver), "interrupted")
    resumed.train(resume=True)
    a, b = (load_checkpoint(t.log_path / "latest") for t in (whole, resumed))
    assert a["epoch"] == b["epoch"] == 4 and a["model"]["temperature"] != 4
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    rates = [group["lr"] for group in b["optimizer"]["param_groups"]]
    assert rates == pytest.approx([0.0005, 0.0005, 0.00005])
    for ours, theirs in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values()):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(torch.as_tensor(ours[k]), torch.as_tensor(theirs[k])) for k in ours)


def test_a_checkpoint_of_another_number_of_groups_is_refused_in_one_line(cfg_of):
    trainer_of(cfg_of("SOLVER.EPOCHS", "1"), grouped=False).train()
    message = (
        r"latest: its optimizer state does not fit this run \(loaded state dict has a different number of parameter "
        r"groups\)$"
    )
    with pytest.raises(UserError, match=message):
        trainer_of(cfg_of()).begin(resume=True)


WORKER = """
import sys
import torch
from mdistiller.distributed.ranks import joined_ranks
from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.meters import Meters
from tests.engine.test_parameter_groups import trainer_of

torch.set_num_threads(1)
out, empty = sys.argv[1:]
with joined_ranks("cpu") as ranks:
    found = {}
    for name in ("base", "dot", "aligned"):
        settings = ["SOLVER.TRAINER", name, "SOLVER.BATCH_SIZE", "8", "EXPERIMENT.DEVICE", "cpu"]
        trainer = trainer_of(load_cfg(empty, settings), dtype=torch.float64)
        trainer.distiller.train()
        for batch in trainer.train_loader:
            batch = trainer.prepare_batch(batch, epoch=1)
            batch["image"] = batch["image"].double()
            trainer.train_iter(batch, 1, Meters())
        found |= {f"{name}/{key}": value for key, value in trainer.distiller.state_dict().items()}
    torch.save(found, f"{out}.{ranks.rank}")
"""


def test_two_processes_take_the_steps_of_one(tmp_path):
    """Three steps in float64, with DistributedDataParallel's averages and with DOT's own."""
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "worker.py").write_text(WORKER)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    two_ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for ranks, name in (([], "one"), (two_ranks, "two")):
        command = [sys.executable, *ranks, tmp_path / "worker.py", tmp_path / name, tmp_path / "empty.yaml"]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
    one, first, second = (torch.load(tmp_path / name) for name in ("one.0", "two.0", "two.1"))
    assert {"base/temperature", "dot/temperature", "aligned/temperature"} <= one.keys()
    for key, value in one.items():
        torch.testing.assert_close(first[key], value, rtol=1e-9, atol=1e-12)
        assert torch.equal(first[key], second[key])
        assert value.dtype == torch.float64 and not torch.equal(value, torch.full_like(value, 4.0))
