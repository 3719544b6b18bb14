"""What changes between steps while they are replayed: a recorded run follows it, or is no longer recorded."""

import copy
from collections import deque

import pytest
import torch

from mdistiller.engine.lr_schedule import adjust_learning_rate
from mdistiller.engine.meters import Meters
from mdistiller.engine.trainer import BaseTrainer
from mdistiller.engine.update import SumUpdate

from .._networks import Net
from ._recorder import recording  # noqa: F401
from ._runs import Plain, trainer_of
from .test_graphed_step import NEVER, at, taken


class Holder:
    weight = 1.0

    def __init__(self):
        self.weight = 1.0


class Weighted(Plain):
    """A loss weight as a number, in an object of one's own, and as a buffer; and what has been seen so far."""

    def __init__(self, student):
        super().__init__(student)
        self.weight, self.holder, self.counts = 1.0, Holder(), False
        self.register_buffer("scale", torch.tensor(1.0))
        self.seen = deque(maxlen=100)

    def forward_train(self, image, target, **kwargs):
        logits, losses = super().forward_train(image, target, **kwargs)
        if self.counts:
            self.seen.append(1)
        weight = self.weight * self.holder.weight * self.scale * (1 + 0.01 * len(self.seen))
        return logits, losses | {"loss_kd": losses["loss_kd"] * weight}


def same(tmp_path, before, steps=12, epochs=1, overrides=(), cls=BaseTrainer):
    """Trains twice, as usual and recorded: the losses must be the same. `before(trainer)` acts before each step."""
    found = []
    for graph in (NEVER, ()):
        torch.manual_seed(1)
        trainer = trainer_of(tmp_path, *graph, *overrides, cls=cls, distiller=Weighted(Net()))
        found.append(taken(trainer, steps, before(trainer), epochs))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def replaced(trainer, **attributes):
    return lambda: [setattr(trainer.distiller, name, value) for name, value in attributes.items()]


def zeros(trainer):
    other = copy.deepcopy(trainer.distiller.student.fc)
    torch.nn.init.zeros_(other.weight)
    return other


# What is done, when (epoch, step), in runs of how many epochs.
DONE = {
    "a layer is frozen": ((1, 8), lambda t: lambda: t.distiller.student.conv.requires_grad_(False)),
    "a weight is set": ((1, 8), lambda t: replaced(t, weight=50.0)),
    "a layer is replaced": ((1, 8), lambda t: lambda: setattr(t.distiller.student, "fc", zeros(t))),
    "a buffer is replaced": ((1, 8), lambda t: replaced(t, scale=torch.tensor(50.0))),
    "an object's weight is set": ((2, 1), lambda t: lambda: setattr(t.distiller.holder, "weight", 50.0)),
    "the norm is clipped": ((2, 1), lambda t: lambda: setattr(t.update, "max_norm", 0.01)),
    "the momentum is dropped": ((2, 1), lambda t: t.optimizer.state.clear),
}


@pytest.mark.parametrize("what", DONE)
def test_it_is_followed(what, tmp_path, recording):  # noqa: F811
    (epoch, step), act = DONE[what]
    clip = ("SOLVER.CLIP_GRAD_NORM", "5.0") if "clipped" in what else ()
    same(tmp_path, lambda t: at((epoch, step), act(t)), steps=12 if epoch == 1 else 6, epochs=epoch, overrides=clip)
    assert recording.recorded == 2 or epoch == 2


def test_a_weight_that_rises_at_every_step(tmp_path, recording):  # noqa: F811
    same(tmp_path, lambda t: lambda now: setattr(t.distiller, "weight", 0.1 * now[1]), steps=16)


def test_what_the_method_has_seen_grows(tmp_path, recording, caplog):  # noqa: F811
    with caplog.at_level("INFO"):
        same(tmp_path, lambda t: replaced(t, counts=True)() and (lambda now: None))
    assert "changes what Python holds of Weighted: seen" in caplog.text


def test_the_update_is_restored_at_an_epochs_start(tmp_path, recording):  # noqa: F811
    def before(trainer):
        kept = []

        def act(now):
            if now == (1, 3):
                kept.append(copy.deepcopy(trainer.update.state_dict()))
            if now == (2, 1):
                trainer.update.load_state_dict(kept[0])

        return act

    same(tmp_path, before, steps=8, epochs=2)


def test_a_new_optimizer_after_the_first_steps(tmp_path, recording):  # noqa: F811
    def before(trainer):
        def act():
            parameters = trainer.distiller.get_learnable_parameters()
            trainer.optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, fused=True)

        return at((1, 8), act)

    same(tmp_path, before, steps=16)


def test_a_group_that_is_added(tmp_path, recording):  # noqa: F811
    class Part(BaseTrainer):
        def init_optimizer(self, cfg):
            return torch.optim.SGD(self.distiller.student.fc.parameters(), lr=0.05, momentum=0.9, fused=True)

    def before(trainer):
        conv = trainer.distiller.student.conv.requires_grad_(False)

        def act():
            conv.requires_grad_(True)
            trainer.optimizer.add_param_group({"params": list(conv.parameters()), "lr": 0.05})

        return at((1, 8), act)

    same(tmp_path, before, steps=16, cls=Part)


def halve_every_fifth(count, parameters):
    with torch.no_grad():
        for p in parameters if count % 5 == 0 else ():
            p.mul_(0.5)


def test_an_optimizer_of_ones_own_that_counts(tmp_path, recording):  # noqa: F811
    class Counting(torch.optim.SGD):
        count = 0

        def step(self, closure=None):
            super().step(closure)
            self.count += 1
            halve_every_fifth(self.count, [p for group in self.param_groups for p in group["params"]])

    class Own(BaseTrainer):
        def init_optimizer(self, cfg):
            return Counting(self.distiller.get_learnable_parameters(), lr=0.05, momentum=0.9, fused=True)

    same(tmp_path, lambda t: lambda now: None, cls=Own, steps=16)


def test_an_update_rule_of_ones_own_that_counts(tmp_path, recording):  # noqa: F811
    class Counting(SumUpdate):
        count = 0

        def step(self, norm=None):
            super().step(norm)
            self.count += 1
            halve_every_fifth(self.count, self.parameters)

    class Own(BaseTrainer):
        update_rule = Counting

    same(tmp_path, lambda t: lambda now: None, cls=Own, steps=16)


def test_a_first_batch_that_is_short(tmp_path, recording):  # noqa: F811
    found = []
    for graph in (NEVER, ()):
        torch.manual_seed(1)
        trainer = trainer_of(tmp_path, *graph, distiller=Weighted(Net()))
        trainer.distiller.train()
        losses = []
        for epoch in (1, 2):
            trainer.distiller.holder.weight = 50.0 ** (epoch - 1)
            trainer.train_loader.set_epoch(epoch)
            *full, short = trainer.train_loader
            for step, batch in enumerate([short, *full], start=1):
                meters = Meters()
                trainer.train_iter(trainer.prepare_batch(batch, epoch), epoch, meters, step=step)
                losses.append(meters.means()["train_loss"])
        found.append(losses)
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_an_attribute_that_cannot_be_looked_into(tmp_path, recording):  # noqa: F811
    same(tmp_path, lambda t: replaced(t, adjacency=torch.eye(3).to_sparse())() and (lambda now: None), steps=6)


def test_rates_of_an_own_optimizer_that_are_one_tensor(tmp_path):
    class Own(BaseTrainer):
        def init_optimizer(self, cfg):
            student = self.distiller.student
            groups = [{"params": [*student.conv.parameters()], "lr_scale": 0.1}, {"params": [*student.fc.parameters()]}]
            return torch.optim.SGD(groups, lr=torch.tensor(cfg.SOLVER.LR), momentum=0.9, foreach=False)

    trainer = trainer_of(tmp_path, cls=Own)
    adjust_learning_rate(1, trainer.cfg, trainer.optimizer)
    assert [float(group["lr"]) for group in trainer.optimizer.param_groups] == pytest.approx([0.005, 0.05])
