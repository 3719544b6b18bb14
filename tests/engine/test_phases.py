"""Stages before training in the trainer: what they train, how long, by which rate, and what of it is kept."""

import csv

import pytest
import torch
import torch.nn as nn

from mdistiller.distillers import Distiller, Stage
from mdistiller.distillers.contract import check_distiller
from mdistiller.engine.files.checkpoint import load_checkpoint
from mdistiller.engine.nan_watch import NonFiniteLossError
from mdistiller.engine.split_update import DotUpdate
from mdistiller.engine.trainer import DOT, BaseTrainer
from mdistiller.engine.update import SumUpdate
from mdistiller.errors import UserError
from mdistiller.experiments.runs import read_epochs

from .._networks import Net
from ._recorder import recording  # noqa: F401
from ._runs import STEPS, rows_of, student_of, trainer_of


class Staged(Distiller):
    """The student's convolution and a layer of the stage's own learn first, in two stages."""

    needs_teacher = False

    def __init__(self, epochs=(2, 1)):
        super().__init__(Net(), nn.Identity())
        self.hint = nn.Linear(4, 2).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.epochs, self.seen = epochs, []

    def get_learnable_parameters(self):
        return [*super().get_learnable_parameters(), *self.norm.parameters()]

    def stages(self):
        hint = [*self.student.conv.parameters(), {"params": self.hint.parameters(), "weight_decay": 0.0}]
        return (
            Stage("hint", self.epochs[0], hint, self.first, lr=0.02),
            Stage("norm", self.epochs[1], list(self.norm.parameters()), self.second),
        )

    def _note(self, name, epoch):
        own = [key for key, p in self.named_parameters() if p.requires_grad]
        self.seen.append((name, int(epoch), own, self.norm.training, self.student.training))

    def first(self, image, target, epoch, **kwargs):
        self._note("hint", epoch)
        return {"loss_hint": self.hint(self.student(image)[1]["pooled_feat"]).square().mean()}

    def second(self, image, target, epoch, **kwargs):
        self._note("norm", epoch)
        return {"loss_norm": (self.norm(self.student(image)[1]["pooled_feat"]) - 1).square().mean()}

    def forward_train(self, image, target, epoch, **kwargs):
        self._note("training", epoch)
        logits, features = self.student(image)
        losses = {"loss_ce": nn.functional.cross_entropy(logits, target)}
        return logits, losses | {"loss_kd": 0.1 * self.norm(features["pooled_feat"]).square().mean()}


def staged(folder, *overrides, epochs=(2, 1), **options):
    torch.manual_seed(0)
    return trainer_of(folder, *overrides, distiller=Staged(epochs), **options)


def test_each_stage_trains_its_parameters_in_its_epochs(tmp_path):
    trainer = staged(tmp_path)
    trainer.train()
    hint = ["student.conv.weight", "student.conv.bias", "hint.weight", "hint.bias"]
    norm = ["norm.weight", "norm.bias"]
    whole = [*hint[:2], "student.fc.weight", "student.fc.bias", *norm]
    expected = [("hint", 1, hint, False, False), ("hint", 2, hint, False, False), ("norm", 1, norm, True, False)]
    expected += [("training", epoch, whole, True, True) for epoch in (1, 2)]
    assert trainer.distiller.seen == [entry for entry in expected for _ in range(STEPS)]
    assert trainer.distiller.stage_on is None and trainer.phases.first == -2


def test_rows_go_on_one_axis_and_readers_get_those_of_training(tmp_path):
    trainer = staged(tmp_path, "LOG.TENSORBOARD_FREQ", "3", "SOLVER.WARMUP_EPOCHS", "1")
    trainer.train()
    rows = rows_of(trainer)
    assert [row["epoch"] for row in rows] == ["-2", "-1", "0", "1", "2"]
    assert [float(row["lr"]) for row in rows] == pytest.approx([0.02, 0.02, 0.05, 0.05, 0.005])
    for row, name in zip(rows, ["loss/loss_hint"] * 2 + ["loss/loss_norm"]):
        assert float(row["train_loss"]) == pytest.approx(float(row[name]), rel=1e-4)
        assert not row["train_acc"] and not row["test_acc"] and not row["loss/loss_ce"]
    assert [row["epoch"] for row in read_epochs(trainer.log_path)] == [1, 2]
    worklog = (trainer.log_path / "worklog.txt").read_text()
    assert [line for line in worklog.splitlines() if line.startswith("epoch")] == [f"epoch: {e}" for e in range(-2, 3)]


def test_a_stage_is_not_scored_and_saves_latest_alone(tmp_path):
    trainer, saved = staged(tmp_path), []
    log = trainer.log

    def seen(*args):
        names = {path.name for path in trainer.log_path.iterdir()}
        saved.append({name for name in names if name.startswith(("student", "best", "latest", "epoch"))})
        log(*args)

    trainer.log = seen
    trainer.train()
    checkpoints = saved
    assert checkpoints[:4] == [set(), {"latest"}, {"latest", "latest_previous"}, {"latest", "latest_previous"}]
    assert trainer.state.best_acc.keys() == {""} and load_checkpoint(trainer.log_path / "best")["epoch"] >= 1


def test_optimizers_begin_anew(tmp_path):
    trainer = staged(tmp_path, "LOG.SAVE_CHECKPOINT_ITERS", "1", "SOLVER.EPOCHS", "1")
    remembered = []
    save = trainer.state.save_within
    trainer.state.save_within = lambda at: (remembered.append(trainer.state.parts["optimizer"].state_dict()), save(at))
    trainer.train()
    groups = [[len(group["params"]) for group in state["optimizer"]["param_groups"]] for state in remembered]
    assert groups == [[2, 2]] * 2 * STEPS + [[2]] * STEPS + [[6]] * (STEPS + 1)  # also before validation
    assert trainer.optimizer is trainer.phases.training.update.optimizer


def test_training_is_what_it_is_without_stages_from_the_weights_that_they_leave(tmp_path):
    trainer, kept = staged(tmp_path, "SOLVER.EMA", "0.9"), []
    begin = trainer.ema.begin

    def begun(network):
        kept.append({key: value.clone() for key, value in trainer.distiller.state_dict().items()})
        begin(network)

    trainer.ema.begin = begun
    trainer.train()
    from_there = staged(tmp_path, "SOLVER.EMA", "0.9", epochs=(0, 0), name="from there")
    from_there.distiller.load_state_dict(kept[0])
    from_there.ema.begin(from_there.distiller.main_network())
    from_there.train()
    for name in ("student_latest", "student_latest_ema"):
        one, other = (load_checkpoint(t.log_path / name)["model"] for t in (trainer, from_there))
        assert all(value.equal(other[key]) for key, value in one.items()), name


class Signalled(BaseTrainer):
    """Stops in a step of the run, counted from 1."""

    at = 0

    def train_iter(self, batch, epoch, meters, recent=None, step=0, measure=False):
        super().train_iter(batch, epoch, meters, recent, step, measure)
        self.at -= 1
        if not self.at:
            self.stop.signal = 15


@pytest.mark.parametrize("step", [1, STEPS, 2 * STEPS + 2, 3 * STEPS, 3 * STEPS + 1])
def test_a_run_that_is_stopped_ends_the_same(step, tmp_path):
    overrides = ("SOLVER.EMA", "0.9")
    whole = staged(tmp_path, *overrides, name="whole")
    whole.train()
    stopped = staged(tmp_path, *overrides, cls=Signalled)
    stopped.at = step
    with pytest.raises(SystemExit):
        stopped.train()
    resumed = staged(tmp_path, *overrides)
    resumed.train(resume=True)
    assert all(value.equal(student_of(resumed)[key]) for key, value in student_of(whole).items())
    lasting = [{k: row[k] for k in ("epoch", "train_loss", "test_acc")} for t in (whole, resumed) for row in rows_of(t)]
    assert lasting[:5] == lasting[5:]


def test_a_stage_of_another_length_is_another_run(tmp_path):
    stopped = staged(tmp_path, cls=Signalled)
    stopped.at = 3
    with pytest.raises(SystemExit):
        stopped.train()
    with pytest.raises(UserError, match="stages before training was 'hint 2, norm 1' and is now 'hint 3, norm 1'"):
        staged(tmp_path, epochs=(3, 1)).train(resume=True)


def test_a_loss_that_is_not_finite_names_the_stage(tmp_path):
    trainer = staged(tmp_path)
    trainer.distiller.hint.weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match=r"^hint, epoch 1, iteration 1: loss_hint = nan"):
        trainer.train()


def test_a_stage_has_one_gradient_also_under_dot(tmp_path):
    trainer = staged(tmp_path, cls=DOT)
    assert isinstance(trainer.phases.turn_to(-1).update, SumUpdate)
    assert not isinstance(trainer.phases.now.update, DotUpdate)
    assert isinstance(trainer.phases.turn_to(1).update, DotUpdate)
    trainer.train()
    assert len(rows_of(trainer)) == 5


def test_a_step_of_a_stage_is_recorded_too(tmp_path, recording):  # noqa: F811
    class Quiet(Staged):
        def _note(self, name, epoch):
            pass

    plain = trainer_of(tmp_path, "SOLVER.CUDA_GRAPH", "never", name="plain", distiller=Quiet())
    plain.train()
    assert recording.recorded == 0
    trainer = trainer_of(tmp_path, distiller=Quiet())
    trainer.train()
    assert recording.recorded == 3
    for key, value in student_of(plain).items():
        torch.testing.assert_close(student_of(trainer)[key], value, rtol=1e-5, atol=1e-6)


def test_a_trainer_of_the_originals_manner_is_refused(tmp_path):
    class Own(BaseTrainer):
        def train_iter(self, data, epoch, train_meters):
            raise AssertionError

    with pytest.raises(UserError, match=r"Own.train_iter.* takes the whole step itself, .* stages .*hint, norm"):
        staged(tmp_path, cls=Own)
    staged(tmp_path, epochs=(0, 0), cls=Own)


class Odd(Staged):
    """Staged with other stages."""

    def stages(self):
        return self.odd


def test_what_a_stage_may_not_be():
    method, linear = Odd(), nn.Linear(1, 1)
    losses = method.first
    cases = {
        "has no parameters to train": (Stage("a", 1, [], losses),),
        r"'a', 'a'; give each its own name": (Stage("a", 1, [linear.weight], losses),) * 2,
        r"is to train a parameter \(1, 1\), which no module of it has": (Stage("a", 1, [linear.weight], losses),),
    }
    for message, method.odd in cases.items():
        with pytest.raises(UserError, match=message):
            check_distiller(method)
    method.odd = (Stage("a", 1, list(method.student.parameters()), losses),)
    check_distiller(method)
    method.add_frozen("helper", linear)
    method.odd = (Stage("a", 1, [linear.weight], losses),)
    with pytest.raises(UserError, match=r"would train helper.weight, which is frozen"):
        check_distiller(method)


def test_a_loop_of_ones_own_turns_to_a_stage():
    method = Staged().train()
    fields = {"image": torch.randn(4, 3, 8, 8), "target": torch.zeros(4, dtype=torch.long), "epoch": 1}
    for stage in method.stages():
        method.turn_to(stage)
        method.train()
        _, losses = method(**fields)
        sum(losses.values()).backward()
        assert {id(p) for p in method.parameters() if p.grad is not None} == set(map(id, stage.parameters))
        method.zero_grad()
    method.turn_to(None)
    assert method(**fields)[1].keys() == {"loss_ce", "loss_kd"}
    assert [key for key, p in method.named_parameters() if not p.requires_grad] == ["hint.weight", "hint.bias"]


def test_metrics_csv_is_read_back(tmp_path):
    """Of a run that is resumed in a stage, the rows before stay."""
    trainer = staged(tmp_path)
    trainer.log_path.mkdir()
    (trainer.log_path / "metrics.csv").write_text("epoch,lr\n-2,0.5\n-1,0.5\n0,0.5\n")
    trainer._open(-1, 0)
    with (trainer.log_path / "metrics.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["-2"]
