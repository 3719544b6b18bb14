"""Trainers that a user wrote for the original: each override works as there, or is refused by name."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mdistiller.distributed.ranks import Ranks
from mdistiller.engine import BaseTrainer
from mdistiller.engine.files.checkpoint import load_checkpoint
from mdistiller.engine.nan_watch import NonFiniteLossError
from mdistiller.engine.placing import own_share
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
    "SOLVER.NAN_POLICY": "skip", "SOLVER.COMPILE": "True", "DISTILLER.TEACHER_CACHE_DEVICE": "device",
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


def test_a_step_whose_gradients_are_not_finite_is_the_one_that_is_named_and_nothing_of_it_is_saved(tmp_path):
    calls = []

    class Bad(OriginalStep):
        def train_iter(self, data, epoch, train_meters):
            calls.append(epoch)
            if len(calls) == 9:
                next(self.distiller.student.parameters()).register_hook(lambda grad: grad * float("nan"))
            super().train_iter(data, epoch, train_meters)

    trainer = trainer_of(tmp_path, "LOG.SAVE_CHECKPOINT_ITERS", "1", cls=Bad)
    with pytest.raises(NonFiniteLossError, match="epoch 2, iteration 3: the step has left weights that are NaN"):
        trainer.train()
    latest = load_checkpoint(trainer.log_path / "latest")
    assert latest["within_epoch"]["step"] == 2
    assert all(tensor.isfinite().all() for tensor in latest["model"].values())


def test_best_acc_may_be_set_as_in_the_original(tmp_path):
    seen = []

    class Own(BaseTrainer):
        def __init__(self, *args):
            super().__init__(*args)
            self.best_acc = -1

        def log(self, lr, epoch, log_dict):
            seen.append((self.best_acc, log_dict["test_acc"]))
            if epoch == 2:
                self.best_acc = 99.5
                assert self.best_acc == 99.5
            super().log(lr, epoch, log_dict)

    trainer = trainer_of(tmp_path, cls=Own)
    trainer.train()
    assert [best for best, _ in seen] == [-1, seen[0][1]] and trainer.best_acc == 99.5
    recorded = max(acc for _, acc in seen)
    assert load_checkpoint(trainer.log_path / "latest")["best_acc"] == recorded
    resumed = trainer_of(tmp_path, "SOLVER.EPOCHS", "3", cls=Own)
    resumed.begin(resume=True)
    assert resumed.best_acc == recorded


def test_a_step_may_call_that_of_another_class_of_the_users_own(tmp_path):
    steps = []

    class Twice(OriginalStep):
        def train_iter(self, data, epoch, train_meters):
            steps.append(epoch)
            return super().train_iter(data, epoch, train_meters)

    trainer_of(tmp_path, cls=Twice).train()
    assert steps == [1] * 6 + [2] * 6

    class Ours(OriginalStep):
        def train_iter(self, batch, epoch, meters, *args, **kwargs):
            return super().train_iter(batch, epoch, meters, *args, **kwargs)

    message = r"Ours.train_iter\(self, batch, .* has other parameters; give it the same: train_iter\(self, data, epoch"
    with pytest.raises(UserError, match=message):
        trainer_of(tmp_path, cls=Ours)

    class Below(type("Wrong", (BaseTrainer,), {"train_iter": calls_the_inherited_step})):
        def train_iter(self, data, epoch, train_meters):
            return super().train_iter(data, epoch, train_meters)

    with pytest.raises(UserError, match=r"calls_the_inherited_step.*has other parameters"):
        trainer_of(tmp_path, cls=Below)


def in_train_mode(self, resume=False):
    self.distiller.train()
    self.begin(resume)


def after_another_super(self, resume=False):
    super(type(self), self).begin(resume)
    self.distiller.train()


def by_class(self, resume=False):
    BaseTrainer.train(self, resume)


def within_a_function(self, resume=False):
    def go():
        return super(type(self), self).train(resume)

    return go()


@pytest.mark.parametrize("method", [in_train_mode, after_another_super])
def test_the_train_of_a_network_is_no_call_of_the_inherited_train(tmp_path, method):
    with pytest.raises(UserError, match="Mine overrides train without calling the inherited one"):
        trainer_of(tmp_path, cls=type("Mine", (BaseTrainer,), {"train": method}))


@pytest.mark.parametrize("method", [by_class, within_a_function])
def test_the_inherited_train_may_be_called_in_any_way(tmp_path, method):
    trainer = trainer_of(tmp_path, cls=type("Mine", (BaseTrainer,), {"train": method}))
    trainer.train()
    assert len(rows_of(trainer)) == 2


SCRIPT = """
import sys
from mdistiller.commands.train import main
from mdistiller.engine import BaseTrainer
from mdistiller.engine.trainer import trainer_dict

class Mine(BaseTrainer):
    def train(self, resume=False):
        print("before, resume", resume)
        super().train(resume)
        print("after")

trainer_dict["mine"] = Mine
for more in ([], [], ["--overwrite"], ["--resume"]):
    try:
        main([*more, *sys.argv[1:]])
        print("RUN ENDS", 0)
    except SystemExit as end:
        print("RUN ENDS", end.code)
"""


def test_the_command_calls_an_overridden_train(tmp_path):
    config = Path(__file__).resolve().parents[2] / "configs/digits/vanilla.yaml"
    settings = ["SOLVER.TRAINER", "mine", "SOLVER.EPOCHS", "1", "DATASET.TRAIN_FRACTION", "0.1", "LOG.WANDB", "False"]

    command = [sys.executable, "-u", "-c", SCRIPT, "--cfg", str(config), *settings]
    done = subprocess.run(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    first, again, replaced, resumed, _ = re.split(r"(?<=RUN ENDS \d)\n", done.stdout)
    for output, resume in ((first, False), (replaced, False), (resumed, True)):
        lines = output.splitlines()
        assert lines[0] == f"before, resume {resume}" and lines[-2:] == ["after", "RUN ENDS 0"], done.stdout
        assert sum(line.startswith("student: ") for line in lines) == 1  # what the command prints itself
    assert "epoch 1/1" in replaced and "is trained already" in resumed
    refused = again.splitlines()
    assert [refused[0], refused[-1]] == ["before, resume False", "RUN ENDS 2"] and len(refused) == 3
    assert "already holds a run" in refused[1]


def test_a_loader_without_shares_is_refused_by_name_on_several_processes():
    data = torch.utils.data.TensorDataset(torch.zeros(4, 3, 8, 8), torch.zeros(4))
    loader = torch.utils.data.DataLoader(data)
    assert own_share(loader, torch.device("cpu"), Ranks()) is loader
    with pytest.raises(UserError, match=r"2 processes .* a DataLoader, which has no shard\(rank, world\); give it one"):
        own_share(loader, torch.device("cpu"), Ranks(rank=1, world=2))


def test_lines_that_an_own_log_adds_to_the_worklog_outlast_a_resume(tmp_path):
    class Adds(BaseTrainer):
        def log(self, lr, epoch, log_dict):
            super().log(lr, epoch, log_dict)
            with (self.log_path / "worklog.txt").open("a") as file:
                file.write(f"mine {epoch}\n")

    whole = trainer_of(tmp_path, "SOLVER.EPOCHS", "3", cls=Adds, name="whole")
    whole.train()
    stopped = trainer_of(tmp_path, "SOLVER.EPOCHS", "3", cls=Adds)
    stopped.state.save = Interrupted(stopped.state.save, calls=2)  # epoch 2 is logged, but runs again
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = trainer_of(tmp_path, "SOLVER.EPOCHS", "3", cls=Adds)
    resumed.train(resume=True)
    own, other = ((trainer.log_path / "worklog.txt").read_text() for trainer in (resumed, whole))
    assert [line for line in own.splitlines() if line.startswith("mine")] == ["mine 1", "mine 2", "mine 3"]
    assert own == other
