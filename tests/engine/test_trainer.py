"""The training loop: schedule, seeds, metrics, files, resuming."""

import csv
import json
import math

import pytest
import torch
import torch.nn as nn

from mdistiller.dataset import ImageArray
from mdistiller.distillers import Distiller
from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.files.checkpoint import load_checkpoint
from mdistiller.engine.lr_schedule import learning_rate
from mdistiller.engine.nan_watch import NonFiniteLossError
from mdistiller.engine.trainer import BaseTrainer, trainer_dict
from mdistiller.engine.utils import adjust_learning_rate
from mdistiller.errors import UserError

from .._networks import CLASSES, Net


class TwoTerms(Distiller):
    """Two loss terms, and two heads to validate."""

    needs_teacher = False

    def __init__(self, student):
        super().__init__(student, nn.Identity())
        self.bad_epoch = 0

    def forward_train(self, image, target, epoch, **kwargs):
        logits, _ = self.student(image)
        penalty = logits.square().mean() * 0.01
        if epoch == self.bad_epoch:
            penalty = penalty * float("nan")
        return logits, {"loss_ce": nn.functional.cross_entropy(logits, target), "loss_penalty": penalty}

    def forward_heads(self, image):
        logits = self.forward_test(image)
        return {"main": logits, "reversed": -logits}


def loaders(batch_size=8):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (44, 8, 8, 3), generator=generator, dtype=torch.uint8)
    targets = torch.arange(44) % CLASSES
    data = ImageArray(images, targets, (0.5,) * 3, (0.25,) * 3)
    return data.loader(batch_size, 0, train=True, seed=0), data.loader(batch_size, 0, train=False)


@pytest.fixture
def cfg_of(tmp_path):
    empty = tmp_path / "empty.yaml"
    empty.write_text("")

    def make(*overrides):
        quiet = ["LOG.WANDB", "False", "LOG.PREFIX", str(tmp_path / "output"), "EXPERIMENT.DEVICE", "cpu"]
        return load_cfg(empty, [*quiet, "SOLVER.EPOCHS", "3", "SOLVER.LR_DECAY_STAGES", "[1, 2]", *overrides])

    return make


def trainer_of(cfg, name="run"):
    torch.manual_seed(0)
    return BaseTrainer(name, TwoTerms(Net()), *loaders(), cfg)


def test_loaders_that_name_their_classes_differently_are_refused(cfg_of):
    train, val = loaders()
    train.class_names, val.class_names = ("ant", "bee", "cat"), ("ant", "cat", "dog")
    said = "3 and 3 classes, 2 labels differently: label 1 is 'bee' and 'cat', 2 is 'cat' and 'dog'; give both"
    with pytest.raises(UserError, match=said):
        BaseTrainer("run", TwoTerms(Net()), train, val, cfg_of())
    val.class_names = ()  # not known
    BaseTrainer("run", TwoTerms(Net()), train, val, cfg_of())


def rows_of(trainer):
    with (trainer.log_path / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


TIMES = {"data_time", "step_time", "images_per_second", "epoch_seconds", "peak_memory_mib"}


def without_times(rows):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def test_the_learning_rate_decays_after_each_stage():
    cfg = load_cfg("configs/cifar100/kd.yaml")
    assert [learning_rate(e, cfg) for e in (1, 150)] == [0.05, 0.05]
    assert learning_rate(151, cfg) == pytest.approx(0.005) and learning_rate(211, cfg) == pytest.approx(0.00005)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    assert adjust_learning_rate(181, cfg, optimizer) == optimizer.param_groups[0]["lr"] == pytest.approx(0.0005)


def test_the_four_trainers_have_the_originals_names():
    assert set(trainer_dict) == {"base", "crd", "dot", "crd_dot", "deepkd", "aligned"}


def test_a_run_writes_the_originals_files(cfg_of):
    trainer = trainer_of(cfg_of("LOG.SAVE_CHECKPOINT_FREQ", "2"))
    trainer.train()
    names = {p.name for p in trainer.log_path.iterdir()}
    assert names == {
        "latest", "latest_previous", "best", "epoch_2", "student_latest", "student_best", "student_2",
        "student_best_reversed",
        "worklog.txt", "metrics.csv", "train.events", "config.yaml", "environment.json",
    }  # fmt: skip
    latest = load_checkpoint(trainer.log_path / "latest")
    assert {"epoch", "model", "optimizer", "best_acc"} <= latest.keys() and latest["epoch"] == 3
    assert load_checkpoint(trainer.log_path / "student_latest")["model"].keys() == Net().state_dict().keys()


def test_metrics_hold_every_loss_term_and_both_heads(cfg_of):
    trainer = trainer_of(cfg_of())
    trainer.train()
    rows = rows_of(trainer)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [float(row["lr"]) for row in rows] == pytest.approx([0.05, 0.005, 0.0005])
    for row in rows:
        assert float(row["train_loss"]) == pytest.approx(
            float(row["loss/loss_ce"]) + float(row["loss/loss_penalty"]), rel=1e-5
        )
        assert row["test_acc"] == row["test_acc_head_main"]
        assert float(row["data_time"]) > 0 and float(row["images_per_second"]) > 0
    assert rows[0].keys() > TIMES


def test_a_method_logs_numbers_of_its_own_each_epoch(cfg_of, caplog):
    caplog.set_level("INFO")
    trainer = trainer_of(cfg_of("SOLVER.EPOCHS", "2"))
    seen = iter([15.5, 2.25])
    trainer.distiller.metrics = lambda: {"temperature": torch.full((1,), next(seen))}
    trainer.train()
    assert [row["method/temperature"] for row in rows_of(trainer)] == ["15.5", "2.25"]
    worklog = (trainer.log_path / "worklog.txt").read_text()
    assert worklog.count("method/temperature: ") == 2 and "method/temperature: 15.50\n" in worklog
    assert "temperature 2.25, " in caplog.text


def test_the_means_weight_every_image_equally_even_if_the_last_batch_is_short(cfg_of):
    trainer = trainer_of(cfg_of("SOLVER.LR", "1e-20", "SOLVER.EPOCHS", "1", "SOLVER.WEIGHT_DECAY", "0"))
    trainer.train()
    trainer.distiller.train()
    total, right = 0.0, 0
    trainer.train_loader.set_epoch(1)
    for image, target, _ in trainer.train_loader:
        for one, label in zip(image, target):
            logits, losses = trainer.distiller(image=one[None], target=label[None], epoch=1)
            total += sum(v.item() for v in losses.values())
            right += int(logits.argmax() == label)
    row = rows_of(trainer)[0]
    assert float(row["train_loss"]) == pytest.approx(total / 44, rel=1e-5)
    assert float(row["train_acc"]) == pytest.approx(100 * right / 44, rel=1e-5)


def test_the_worklog_has_the_originals_format_and_the_unrounded_learning_rate(cfg_of):
    trainer = trainer_of(cfg_of())
    trainer.train()
    lines = (trainer.log_path / "worklog.txt").read_text().splitlines()
    assert lines[:3] == ["-" * 25, "epoch: 1", "lr: 0.05"]
    assert [line.split(":")[0] for line in lines[3:8]] == [
        "train_acc", "train_loss", "test_acc", "test_acc_top5", "test_loss"
    ]  # fmt: skip
    assert "lr: 0.0005" in lines
    assert any(line.startswith("best_acc_head_main\t") for line in lines)


def test_the_record_holds_what_is_needed_to_repeat_the_run(cfg_of):
    trainer = trainer_of(cfg_of("EXPERIMENT.SEED", "7"))
    trainer.run(trainer.begin())
    record = json.loads((trainer.log_path / "environment.json").read_text())
    assert record["seed"] == 7 and record["torch"] == torch.__version__ and "command" in record
    assert load_cfg(trainer.log_path / "config.yaml") == trainer.cfg


def test_the_same_seed_gives_the_same_run_and_another_seed_a_different_one(cfg_of):
    runs = [trainer_of(cfg_of(), name) for name in "ab"]
    for trainer in runs:
        trainer.train()
    assert without_times(rows_of(runs[0])) == without_times(rows_of(runs[1]))
    a, b = (t.distiller.state_dict() for t in runs)
    assert all(torch.equal(a[k], b[k]) for k in a)
    torch.manual_seed(1)
    other = BaseTrainer("c", TwoTerms(Net()), *loaders(), cfg_of("EXPERIMENT.SEED", "1"))
    other.train()
    assert without_times(rows_of(runs[0])) != without_times(rows_of(other))


def test_a_resumed_run_ends_like_one_that_was_never_stopped(cfg_of):
    whole, interrupted = trainer_of(cfg_of(), "whole"), trainer_of(cfg_of(), "interrupted")
    whole.train()
    interrupted.begin()
    interrupted.cfg = cfg_of("SOLVER.EPOCHS", "2")
    interrupted.train()
    torch.manual_seed(99)
    resumed = BaseTrainer("interrupted", TwoTerms(Net()), *loaders(), cfg_of())
    resumed.train(resume=True)
    assert without_times(rows_of(whole)) == without_times(rows_of(resumed))
    a, b = (load_checkpoint(t.log_path / "latest") for t in (whole, resumed))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    buffers = [[s["momentum_buffer"] for s in x["optimizer"]["state"].values()] for x in (a, b)]
    assert all(torch.equal(x, y) for x, y in zip(*buffers)) and a["head_best_acc"] == b["head_best_acc"]


def test_the_originals_latest_can_be_resumed(cfg_of):
    trainer = trainer_of(cfg_of())
    trainer.log_path.mkdir(parents=True)
    state = {f"module.{k}": v for k, v in trainer.distiller.state_dict().items()}
    original = {"epoch": 2, "model": state, "optimizer": trainer.optimizer.state_dict(), "best_acc": 12.5}
    torch.save(original, trainer.log_path / "latest")
    assert trainer.begin(resume=True) == 3 and list(trainer.state.best_acc.values()) == [12.5]


def test_an_existing_run_is_not_overwritten_unasked(cfg_of):
    trainer_of(cfg_of()).train()
    message = "already holds a run; add --resume to continue it, or --overwrite to replace it"
    with pytest.raises(UserError, match=message):
        trainer_of(cfg_of()).train()
    assert trainer_of(cfg_of()).begin(overwrite=True) == 1


def test_overwriting_a_run_starts_new_files(cfg_of):
    trainer_of(cfg_of()).train()
    again = trainer_of(cfg_of("SOLVER.EPOCHS", "1"))
    (again.log_path / "epoch_40").write_bytes((again.log_path / "latest").read_bytes())
    again.run(again.begin(overwrite=True))
    assert not (again.log_path / "epoch_40").exists()  # it belongs to the overwritten run
    assert len(rows_of(again)) == 1
    assert (again.log_path / "worklog.txt").read_text().count("epoch: 1\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no checkpoint at .*latest"),
        ({"epoch": 1}, "is not a checkpoint to resume from"),
        ({"epoch": 1, "model": {}, "optimizer": {}, "best_acc": 0.0}, "does not fit TwoTerms"),
    ],
)
def test_resuming_without_a_fitting_checkpoint_is_refused(cfg_of, content, message):
    trainer = trainer_of(cfg_of())
    trainer.log_path.mkdir(parents=True)
    if content is not None:
        torch.save(content, trainer.log_path / "latest")
    with pytest.raises(UserError, match=message):
        trainer.begin(resume=True)


def test_a_loss_that_is_not_finite_stops_the_run_with_its_name_and_keeps_the_last_checkpoint(cfg_of):
    trainer = trainer_of(cfg_of())
    trainer.distiller.bad_epoch = 2
    with pytest.raises(NonFiniteLossError, match=r"epoch 2, iteration 1: loss_ce = \d.*, loss_penalty = nan"):
        trainer.train()
    note = json.loads((trainer.log_path / "non_finite.json").read_text())
    trainer.train_loader.set_epoch(2)
    _, _, index = next(iter(trainer.train_loader))
    assert note["index"] == index.tolist() and note["losses"]["loss_penalty"] == "nan"
    latest = load_checkpoint(trainer.log_path / "latest")
    assert latest["epoch"] == 1 and all(math.isfinite(v.sum()) for v in latest["model"].values())


def test_steps_are_logged_every_tensorboard_freq_steps(cfg_of):
    trainer = trainer_of(cfg_of("LOG.TENSORBOARD_FREQ", "2"))
    steps = []
    trainer.log_path.mkdir(parents=True)
    first = trainer.begin()
    import mdistiller.engine.trainer as module

    build = module.build_logger

    def spied(*args):
        logger = build(*args)
        record = logger.step
        logger.step = lambda step, scalars: (steps.append((step, set(scalars))), record(step, scalars))
        return logger

    module.build_logger = spied
    try:
        trainer.run(first)
    finally:
        module.build_logger = build
    assert [step for step, _ in steps] == [2, 4, 6, 8, 10, 12, 14, 16, 18]
    assert {"lr", "train_loss", "loss/loss_ce", "loss/loss_penalty"} <= steps[0][1]
