"""Trainers that a user wrote for the original: each override works as there, or is refused by name."""

import time

import pytest
import torch

from mdistiller.engine import DOT, BaseTrainer
from mdistiller.engine.files.checkpoint import load_checkpoint
from mdistiller.engine.nan_watch import NonFiniteLossError
from mdistiller.engine.utils import accuracy
from mdistiller.errors import UserError

from .._networks import Net
from ._runs import Interrupted, Plain, rows_of, student_of, trainer_of


class OriginalStep(BaseTrainer):
    """A step in the original's manner."""

    def train_iter(self, data, epoch, train_meters):
        self.optimizer.zero_grad()
        began = time.time()
        image, target, _index = data
        train_meters["data_time"].update(time.time() - began)
        preds, losses_dict = self.distiller(image=image.float(), target=target, epoch=epoch)
        loss = sum([term.mean() for term in losses_dict.values()])
        loss.backward()
        self.optimizer.step()
        train_meters["training_time"].update(time.time() - began)
        acc1, acc5 = accuracy(preds, target, topk=(1, 5))
        train_meters["losses"].update(loss.cpu().detach().numpy().mean(), image.size(0))
        train_meters["top1"].update(acc1[0], image.size(0))
        train_meters["top5"].update(acc5[0], image.size(0))
        return f"Epoch:{epoch}| Loss:{train_meters['losses'].avg:.4f}"


def test_a_step_in_the_originals_manner_trains_and_logs_as_the_trainers_own(tmp_path):
    theirs, ours = trainer_of(tmp_path, cls=OriginalStep, name="theirs"), trainer_of(tmp_path, name="ours")
    theirs.train()
    ours.train()
    for name, tensor in student_of(ours).items():
        torch.testing.assert_close(student_of(theirs)[name], tensor, rtol=0, atol=1e-6)
    for one, other in zip(rows_of(theirs), rows_of(ours), strict=True):
        for column in ("lr", "train_acc", "train_acc_top5", "train_loss", "test_acc", "test_loss"):
            assert float(one[column]) == pytest.approx(float(other[column]), abs=1e-4), column


def test_a_step_in_the_originals_manner_resumes_within_an_epoch(tmp_path):
    every = "LOG.SAVE_CHECKPOINT_ITERS", "2"
    whole = trainer_of(tmp_path, *every, cls=OriginalStep, name="whole")
    whole.train()

    stopped = trainer_of(tmp_path, *every, cls=OriginalStep)
    stopped.train_iter = Interrupted(stopped.train_iter, calls=9)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = trainer_of(tmp_path, *every, cls=OriginalStep)
    resumed.train(resume=True)
    for name, tensor in student_of(whole).items():
        assert torch.equal(student_of(resumed)[name], tensor)
    assert rows_of(resumed)[1]["train_loss"] == rows_of(whole)[1]["train_loss"]


def test_a_step_in_the_originals_manner_that_diverges_stops_the_run(tmp_path):
    class Bad(Plain):
        def forward_train(self, image, target, **kwargs):
            logits, losses = super().forward_train(image, target)
            return logits, losses | {"loss_kd": losses["loss_kd"] * float("nan")}

    with pytest.raises(NonFiniteLossError, match="epoch 1, iteration 1: the loss is nan"):
        trainer_of(tmp_path, cls=OriginalStep, distiller=Bad(Net())).train()


def test_a_step_that_updates_no_meter_is_refused_by_name(tmp_path):
    class Silent(BaseTrainer):
        def train_iter(self, data, epoch, train_meters):
            return ""

    with pytest.raises(UserError, match=r"Silent.train_iter did not update train_meters\['top1'\]"):
        trainer_of(tmp_path, cls=Silent).train()


WITHOUT_EFFECT = {
    "SOLVER.EMA": "0.9", "SOLVER.ACCUMULATE": "2", "SOLVER.AMP": "bf16", "SOLVER.CLIP_GRAD_NORM": "1",
    "SOLVER.NAN_POLICY": "skip", "SOLVER.COMPILE": "True",
}  # fmt: skip


@pytest.mark.parametrize("key", WITHOUT_EFFECT)
def test_a_setting_that_a_step_in_the_originals_manner_does_not_obey_is_refused(tmp_path, key):
    with pytest.raises(UserError, match=rf"OriginalStep.train_iter\(data, epoch, train_meters\) .*{key}"):
        trainer_of(tmp_path, key, WITHOUT_EFFECT[key], cls=OriginalStep)


def test_a_step_with_our_parameters_may_call_the_inherited_one(tmp_path):
    seen = []

    class Counting(BaseTrainer):
        def train_iter(self, batch, epoch, *args, **kwargs):
            seen.append((epoch, sorted(batch)))
            return super().train_iter(batch, epoch, *args, **kwargs)

    trainer_of(tmp_path, "SOLVER.EMA", "0.9", cls=Counting).train()
    assert seen == [(epoch, ["image", "index", "target"]) for epoch in (1, 2) for _ in range(6)]


def test_the_optimizer_of_init_optimizer_trains(tmp_path):
    class Adam(BaseTrainer):
        def init_optimizer(self, cfg):
            parameters = self.distiller.module.get_learnable_parameters()
            return torch.optim.Adam(parameters, lr=cfg.SOLVER.LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY)

    trainer = trainer_of(tmp_path, cls=Adam)
    trainer.train()
    assert type(trainer.optimizer) is torch.optim.Adam
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.005)  # the schedule is SOLVER's
    state = load_checkpoint(trainer.log_path / "latest")["optimizer"]["state"]
    assert all("exp_avg_sq" in of and int(of["step"]) == 12 for of in state.values()) and state
    plain = trainer_of(tmp_path, cls=BaseTrainer, name="plain")
    plain.train()
    assert not torch.equal(student_of(trainer)["fc.weight"], student_of(plain)["fc.weight"])


def test_a_run_with_its_own_optimizer_resumes_exactly(tmp_path):
    class Adam(BaseTrainer):
        def init_optimizer(self, cfg):
            return torch.optim.Adam(self.distiller.module.get_learnable_parameters(), lr=0.001)

    whole = trainer_of(tmp_path, cls=Adam, name="whole")
    whole.train()
    stopped = trainer_of(tmp_path, cls=Adam)
    stopped.log = Interrupted(stopped.log, calls=2)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = trainer_of(tmp_path, cls=Adam)
    resumed.train(resume=True)
    assert all(torch.equal(student_of(resumed)[name], tensor) for name, tensor in student_of(whole).items())


def test_a_parameter_group_with_a_learning_rate_of_its_own_keeps_its_ratio_to_the_schedule(tmp_path):
    class Groups(BaseTrainer):
        def init_optimizer(self, cfg):
            student = self.distiller.module.student
            groups = [{"params": student.conv.parameters(), "lr": 0.01}, {"params": student.fc.parameters()}]
            return torch.optim.SGD(groups, lr=cfg.SOLVER.LR)

    trainer = trainer_of(tmp_path, cls=Groups)
    trainer.train()
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([0.001, 0.005])


def test_an_optimizer_that_dot_cannot_use_is_refused(tmp_path):
    class Sgd(DOT):
        def init_optimizer(self, cfg):
            return torch.optim.SGD(self.distiller.module.get_learnable_parameters(), lr=0.1)

    with pytest.raises(UserError, match=r"Sgd\.init_optimizer must return a DistillationOrientedTrainer, not a SGD"):
        trainer_of(tmp_path, cls=Sgd)

    class Nothing(BaseTrainer):
        def init_optimizer(self, cfg):
            self.optimizer = None

    with pytest.raises(UserError, match=r"Nothing\.init_optimizer must return an? Optimizer, not a NoneType"):
        trainer_of(tmp_path, cls=Nothing)


def test_log_is_called_once_an_epoch_with_the_originals_arguments(tmp_path):
    calls = []

    class Logging(BaseTrainer):
        def log(self, lr, epoch, log_dict):
            calls.append((lr, epoch, dict(log_dict), self.best_acc))
            super().log(lr, epoch, {**log_dict, "own": 10.0 * epoch})

    trainer = trainer_of(tmp_path, cls=Logging)
    trainer.train()
    assert [call[:2] for call in calls] == [(pytest.approx(0.05), 1), (pytest.approx(0.005), 2)]
    for _, _, log_dict, _ in calls:
        assert {"train_acc", "train_loss", "test_acc", "test_acc_top5", "test_loss"} <= log_dict.keys()
        assert "lr" not in log_dict
    assert [call[3] for call in calls] == [-1.0, calls[0][2]["test_acc"]]  # the best of the epochs before
    assert [row["own"] for row in rows_of(trainer)] == ["10", "20"]
    assert trainer.best_acc == max(call[2]["test_acc"] for call in calls)


def whole_epoch(self, epoch):
    for data in self.train_loader:
        self.train_iter(data, epoch, {})


def whole_run(self, resume=False):
    for epoch in range(1, 3):
        self.train_epoch(epoch)


def writes_scalars(self, lr, epoch, log_dict):
    self.tf_writer.add_scalar("lr", lr, epoch)


def calls_the_inherited_step(self, data, epoch, train_meters):
    return BaseTrainer.train_iter(self, data, epoch, train_meters)


def takes_two(self, data, epoch):
    return ""


REFUSED = {
    "train_epoch": (whole_epoch, "overrides train_epoch without calling the inherited one"),
    "train": (whole_run, "overrides train without calling the inherited one"),
    "log": (writes_scalars, "log uses tf_writer, which this trainer does not have; let log"),
    "train_iter": (calls_the_inherited_step, "calls the inherited train_iter, which has other parameters"),
    "train_iter ": (takes_two, r"train_iter must take \(data, epoch, train_meters\), or as here train_iter\(self"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_override_that_cannot_work_is_refused_when_the_trainer_is_built(tmp_path, name):
    method, message = REFUSED[name]
    cls = type("Mine", (BaseTrainer,), {name.strip(): method})
    with pytest.raises(UserError, match=message):
        trainer_of(tmp_path, cls=cls)


def test_an_epoch_around_the_inherited_one_works(tmp_path):
    epochs = []

    class Around(BaseTrainer):
        def train_epoch(self, epoch):
            epochs.append(epoch)
            super().train_epoch(epoch)

    trainer_of(tmp_path, cls=Around).train()
    assert epochs == [1, 2]
