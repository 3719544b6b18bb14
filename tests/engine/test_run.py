"""What a whole run does, seen from its files and its results; the oracles are loops in plain torch."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from mdistiller.engine.build import build_trainer
from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.files.checkpoint import load_checkpoint
from mdistiller.engine.nan_watch import NonFiniteLossError

from .._networks import CLASSES, Net, write_untrained
from ._runs import BATCH, STEPS, Interrupted, Plain, loaders, rows_of, student_of, trainer_of
from .logs.test_tensorboard import events

REPOSITORY = Path(__file__).resolve().parents[2]


class Dropping(nn.Module):
    """A network that draws random numbers while it trains, and whose BatchNorm differs between the two modes."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, CLASSES)

    def forward(self, image):
        pooled = F.dropout(self.bn(self.conv(image)).relu().mean((2, 3)), 0.5, self.training)
        return self.fc(pooled), {"pooled_feat": pooled}


def dropping(folder, *overrides, name="run", draws=0):
    """A trainer of `Dropping`; the generators of this process then stand elsewhere, as `draws` says."""
    torch.manual_seed(0)
    trainer = trainer_of(folder, *overrides, name=name, distiller=Plain(Dropping()))
    torch.manual_seed(1000 + draws)
    return trainer


def same(one, other):
    return all(torch.equal(other[name], tensor) for name, tensor in one.items())


def gradients(batch, network):
    """The gradients of Plain's losses, by plain torch."""
    image, target, _ = batch
    logits, _ = network(image)
    loss = F.cross_entropy(logits, target) + 0.1 * logits.square().mean()
    return torch.autograd.grad(loss, list(network.parameters()))


def naive_run(rates):
    """SGD without momentum on Plain's losses: the network after an epoch, and each step's norm of the gradients."""
    torch.manual_seed(0)
    network, (loader, _) = Net(), loaders()
    loader.set_epoch(1)
    norms = []
    for batch, rate in zip(loader, rates, strict=True):
        grads = gradients(batch, network)
        norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in grads)))
        with torch.no_grad():
            for p, g in zip(network.parameters(), grads):
                p -= rate * g
    return network.state_dict(), norms


PLAIN_SGD = ("SOLVER.MOMENTUM", "0", "SOLVER.WEIGHT_DECAY", "0", "SOLVER.EPOCHS", "1", "SOLVER.LR_DECAY_STAGES", "[]")


def test_the_logged_norm_is_that_of_the_gradients_of_its_step(tmp_path):
    trainer = trainer_of(tmp_path, *PLAIN_SGD, "LOG.TENSORBOARD_FREQ", "3")
    trainer.train()
    logged = {step: value for step, tag, value in events(trainer.log_path / "train.events/steps") if "norm" in tag}
    _, norms = naive_run([0.05] * STEPS)
    assert logged == {3: pytest.approx(norms[2], rel=1e-4), 6: pytest.approx(norms[5], rel=1e-4)}


def test_the_learning_rate_changes_with_every_step(tmp_path):
    cosine = "SOLVER.LR_SCHEDULE", "cosine", "SOLVER.LR", "0.2", "SOLVER.LR_MIN", "0.02"
    trainer = trainer_of(tmp_path, *PLAIN_SGD, *cosine, "LOG.TENSORBOARD_FREQ", "1")
    trainer.train()
    rates = [0.02 + 0.18 * (1 + math.cos(math.pi * step / STEPS)) / 2 for step in range(STEPS)]
    logged = [value for _, tag, value in events(trainer.log_path / "train.events/steps") if tag == "step/lr"]
    assert logged == pytest.approx(rates, rel=1e-5)
    expected, _ = naive_run(rates)
    for name, tensor in student_of(trainer).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)


def test_a_network_with_dropout_trains_the_same_wherever_the_generators_stood(tmp_path):
    runs = [dropping(tmp_path, name=str(draws), draws=draws) for draws in range(2)]
    for trainer in runs:
        trainer.train()
    assert same(*map(student_of, runs))
    other = dropping(tmp_path, "EXPERIMENT.SEED", "1", name="other")
    other.train()
    assert not same(student_of(runs[0]), student_of(other))


@pytest.mark.parametrize("stop_at", [STEPS + 1, STEPS + 4], ids=["between epochs", "within an epoch"])
def test_a_network_with_dropout_resumes_exactly(tmp_path, stop_at):
    each = "LOG.SAVE_CHECKPOINT_ITERS", "1"
    whole, stopped = dropping(tmp_path, *each, name="whole"), dropping(tmp_path, *each)
    whole.train()
    stopped.train_iter = Interrupted(stopped.train_iter, calls=stop_at)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = dropping(tmp_path, *each, draws=7)
    resumed.train(resume=True)
    assert same(student_of(whole), student_of(resumed))
    assert [row["train_loss"] for row in rows_of(whole)] == [row["train_loss"] for row in rows_of(resumed)]


def test_validation_is_in_eval_mode_and_training_in_training_mode_again(tmp_path):
    trainer = dropping(tmp_path, "LOG.SAVE_CHECKPOINT_FREQ", "1")
    trainer.train()
    torch.manual_seed(0)
    _, val = loaders()
    images, targets = map(torch.cat, zip(*val))
    for epoch, row in enumerate(rows_of(trainer), start=1):
        network = Dropping()
        network.load_state_dict(load_checkpoint(trainer.log_path / f"student_{epoch}")["model"])
        with torch.no_grad():
            logits, _ = network.eval()(images)
        assert float(row["test_loss"]) == pytest.approx(float(F.cross_entropy(logits, targets)), rel=1e-4)
        right = float((logits.argmax(1) == targets).double().mean())
        assert float(row["test_acc"]) == pytest.approx(100 * right, rel=1e-4)
    # In training mode a BatchNorm counts its batches.
    assert int(student_of(trainer)["bn.num_batches_tracked"]) == 2 * STEPS


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    trainer = trainer_of(tmp_path, "LOG.SAVE_CHECKPOINT_FREQ", "1", "LOG.KEEP_CHECKPOINTS", "2", "SOLVER.EPOCHS", "5")
    trainer.train()
    numbered = {path.name for path in trainer.log_path.iterdir() if path.name[-1].isdecimal()}
    assert numbered == {"epoch_4", "epoch_5", "student_4", "student_5"}


@pytest.fixture
def kernels():
    """Restores what `choose_kernels` sets."""
    before, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(before)
    torch.backends.cudnn.benchmark = benchmark


def test_the_configuration_chooses_the_kernels(tmp_path, kernels, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for chosen in (True, False):
        trainer_of(tmp_path, "EXPERIMENT.DETERMINISTIC", str(chosen), name=str(chosen))
        assert torch.are_deterministic_algorithms_enabled() is chosen
        assert torch.backends.cudnn.benchmark is not chosen


KEEPS = """
import sys, tempfile
from pathlib import Path
import torch
from tests.engine._runs import trainer_of

def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * __import__("os").sysconf("SC_PAGE_SIZE") // 2**20

def given_back():
    block = torch.ones(2**26)  # 256 MiB
    full = resident()
    del block
    return full - resident()

before = given_back()
trainer_of(Path(tempfile.mkdtemp()))
print(before, given_back())
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_a_trainer_on_the_cpu_keeps_the_memory_of_freed_tensors():
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", KEEPS]
    done = subprocess.run(command, cwd=REPOSITORY, env=plain, capture_output=True, text=True, timeout=120)
    before, after = map(int, done.stdout.split())
    if before < 200:
        pytest.skip("this system's malloc keeps large blocks by itself")
    assert after < 50


def test_fp16_gradients_are_clipped_by_their_own_norm_not_by_the_scaled_one(tmp_path):
    """With plain SGD a step is LR times the clipped gradient: as long as LR times CLIP_GRAD_NORM."""
    clipped = "SOLVER.AMP", "fp16", "SOLVER.CLIP_GRAD_NORM", "0.01"
    trainer = trainer_of(tmp_path, *PLAIN_SGD, *clipped)
    take, lengths = trainer.train_iter, []

    def measured(*args, **kwargs):
        before = [p.detach().clone() for p in trainer.distiller.student.parameters()]
        take(*args, **kwargs)
        moved = [(p.detach() - q).norm() for p, q in zip(trainer.distiller.student.parameters(), before)]
        lengths.append(float(torch.stack(moved).norm()))

    trainer.train_iter = measured
    trainer.train()
    taken = [length for length in lengths if length]  # the others' scaled gradients overflow, until the scale fits
    assert taken == pytest.approx([0.05 * 0.01] * len(taken), rel=1e-2) and len(taken) >= 2


class BadImages(Plain):
    """NaN in the loss of every batch that holds one of the images `bad`."""

    bad: tuple[int, ...] = ()

    def forward_train(self, image, target, index, **kwargs):
        logits, losses = super().forward_train(image, target)
        spoilt = torch.isin(index, torch.tensor(self.bad)).any()
        return logits, losses | {"loss_kd": torch.where(spoilt, torch.nan, losses["loss_kd"])}


def images_of_step(epoch, step):
    """The images of a step, from 1."""
    loader, _ = loaders()
    loader.set_epoch(epoch)
    return list(loader)[step - 1][2].tolist()


def test_a_window_of_losses_names_the_step_of_the_first_bad_one(tmp_path):
    """On a GPU the losses of many steps are read together."""
    distiller = BadImages(Net())
    distiller.bad = (images_of_step(1, 3)[0], images_of_step(1, 5)[0])
    trainer = trainer_of(tmp_path, distiller=distiller)
    trainer.nan_policy.every = 50
    with pytest.raises(NonFiniteLossError, match="epoch 1, iteration 3"):
        trainer.train()
    record = (trainer.log_path / "non_finite.json").read_text()
    assert f'"index": {images_of_step(1, 3)}' in record and '"iteration": 3' in record


def test_the_number_of_skipped_steps_survives_an_interruption(tmp_path):
    distiller = BadImages(Net())
    distiller.bad = (images_of_step(1, 2)[0], images_of_step(1, 5)[0])
    skip = "SOLVER.NAN_POLICY", "skip", "LOG.SAVE_CHECKPOINT_ITERS", "1"
    stopped = trainer_of(tmp_path, *skip, distiller=distiller)
    stopped.train_iter = Interrupted(stopped.train_iter, calls=4)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    again = BadImages(Net())
    again.bad = distiller.bad
    resumed = trainer_of(tmp_path, *skip, distiller=again)
    resumed.train(resume=True)
    skipped = [
        sum(bool(set(images_of_step(epoch, step)) & set(distiller.bad)) for step in range(1, STEPS + 1))
        for epoch in (1, 2)
    ]
    assert [int(row["skipped_steps"]) for row in rows_of(resumed)] == skipped and skipped[0] == 2


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    return write_untrained(tmp_path_factory.mktemp("teacher") / "resnet8", "resnet8", seed=1)


def digits(folder, teacher_file, *overrides):
    """A trainer of KD on 70 digits."""
    quiet = ["LOG.WANDB", "False", "LOG.PREFIX", str(folder), "EXPERIMENT.DEVICE", "cpu"]
    teacher = ["DISTILLER.TEACHER", "resnet8", "DISTILLER.TEACHER_CKPT", str(teacher_file)]
    small = ["DATASET.TRAIN_FRACTION", "0.05", "SOLVER.EPOCHS", "2", "EXPERIMENT.NAME", "run"]
    return build_trainer(load_cfg("configs/digits/kd.yaml", [*quiet, *teacher, *small, *overrides]))


def test_a_resumed_run_folds_its_teacher_again(tmp_path, teacher_file, monkeypatch):
    """Then the teacher's forward pass runs no BatchNorm: a step runs the student's alone."""
    calls = []
    batch_norm = F.batch_norm
    monkeypatch.setattr(F, "batch_norm", lambda *args, **kwargs: calls.append(1) or batch_norm(*args, **kwargs))

    def in_a_step(trainer):
        calls.clear()
        trainer.distiller.train()
        fields = trainer.prepare_batch(next(iter(trainer.train_loader)), 2)
        trainer.step(fields, 2, 1)
        return len(calls)

    fresh = digits(tmp_path, teacher_file)
    students = sum(isinstance(layer, nn.BatchNorm2d) for layer in fresh.distiller.student.modules())
    fresh.train_iter = Interrupted(fresh.train_iter, calls=4)
    with pytest.raises(KeyboardInterrupt):
        fresh.train()
    resumed = digits(tmp_path, teacher_file)
    resumed.begin(resume=True)
    assert in_a_step(resumed) == students


def test_the_hits_of_the_teachers_cache_are_those_of_each_epoch(tmp_path, teacher_file):
    cache = "DISTILLER.TEACHER_CACHE", str(tmp_path / "cache")
    digits(tmp_path / "first", teacher_file, *cache, "SOLVER.EPOCHS", "1").train()
    second = digits(tmp_path / "second", teacher_file, *cache)
    second.train()
    known, unknown = (float(row["teacher_cache_hits"]) for row in rows_of(second))
    assert known == 100.0 and unknown < 25.0  # of 81 crops an image, one is known


def test_batches_are_what_these_tests_take_them_for():
    sizes = [len(images_of_step(1, step)) for step in range(1, STEPS + 1)]
    assert sizes == [BATCH] * 5 + [4]
