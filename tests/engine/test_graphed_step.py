"""SOLVER.CUDA_GRAPH: the recorded step against the step itself, and what cannot be recorded."""

import random

import pytest
import torch
import torch.nn as nn

from mdistiller.engine.files.checkpoint import load_checkpoint
from mdistiller.engine.meters import Meters
from mdistiller.engine.nan_watch import NonFiniteLossError
from mdistiller.engine.trainer import DOT, Aligned, BaseTrainer
from mdistiller.errors import UserError

from .._networks import Net
from ._recorder import recording  # noqa: F401
from ._runs import BATCH, STEPS, Plain, rows_of, student_of, trainer_of

ADAMW = ("SOLVER.TYPE", "AdamW", "SOLVER.LR", "0.001")
NEVER = ("SOLVER.CUDA_GRAPH", "never")
MODES = {
    "plain": ((), BaseTrainer),
    "every step's own rate": (("SOLVER.LR_SCHEDULE", "cosine", "SOLVER.WARMUP_EPOCHS", "1"), BaseTrainer),
    "clipped, EMA": (("SOLVER.CLIP_GRAD_NORM", "0.5", "SOLVER.EMA", "0.9"), BaseTrainer),
    "micro-batches": (("SOLVER.ACCUMULATE", "3"), BaseTrainer),
    "AdamW": (("SOLVER.TYPE", "AdamW", "SOLVER.LR", "0.001"), BaseTrainer),
    "bf16": (("SOLVER.AMP", "bf16"), BaseTrainer),
    "fp16": (("SOLVER.AMP", "fp16", "SOLVER.TYPE", "AdamW", "SOLVER.LR", "0.001"), BaseTrainer),
    "DOT": ((), DOT),
    "aligned": ((), Aligned),
    "aligned, fp16, micro-batches": (("SOLVER.AMP", "fp16", "SOLVER.ACCUMULATE", "3", *ADAMW), Aligned),
}


def without_times(trainer):
    times = ("time", "seconds", "images_per_second", "memory")
    return [{k: float(v) for k, v in row.items() if not any(t in k for t in times)} for row in rows_of(trainer)]


@pytest.mark.parametrize("mode", MODES)
def test_a_recorded_run_ends_as_the_run_itself(mode, tmp_path, recording):  # noqa: F811
    overrides, cls = MODES[mode]
    usual = trainer_of(tmp_path, *overrides, *NEVER, cls=cls, name="usual")
    usual.train()
    assert recording.recorded == 0
    trainer = trainer_of(tmp_path, *overrides, cls=cls)
    trainer.train()
    assert recording.recorded == 1 and trainer.take_step.recording.replays == 2 * (STEPS - 1) - 3
    for one, other in zip(without_times(usual), without_times(trainer), strict=True):
        assert other == pytest.approx(one, rel=1e-5)
    for name, tensor in student_of(usual).items():
        torch.testing.assert_close(student_of(trainer)[name], tensor, rtol=1e-5, atol=1e-6)
    one, other = (load_checkpoint(t.log_path / "latest")["optimizer"]["param_groups"] for t in (usual, trainer))
    assert [type(group["lr"]) for group in other] == [float] and other[0]["lr"] == pytest.approx(one[0]["lr"])


def test_a_recorded_run_resumes_within_an_epoch(tmp_path, recording):  # noqa: F811
    whole = trainer_of(tmp_path, name="whole")
    whole.train()

    class Stopping(BaseTrainer):
        def train_iter(self, batch, epoch, meters, recent=None, step=0, measure=False):
            super().train_iter(batch, epoch, meters, recent, step, measure)
            if (epoch, step) == (1, 5):  # the first replay is step 4
                self.stop.signal = 15

    with pytest.raises(SystemExit):
        trainer_of(tmp_path, cls=Stopping).train()
    resumed = trainer_of(tmp_path)
    resumed.train(resume=True)
    assert recording.recorded == 3
    for name, tensor in student_of(whole).items():
        torch.testing.assert_close(student_of(resumed)[name], tensor, rtol=1e-5, atol=1e-6)
    for one, other in zip(without_times(whole), without_times(resumed), strict=True):
        assert other == pytest.approx(one, rel=1e-5)


class Counting(Plain):
    calls = 0

    def forward_train(self, image, target, **kwargs):
        self.calls += 1
        logits, losses = super().forward_train(image, target, **kwargs)
        return logits, losses | {"loss_kd": losses["loss_kd"] * self.calls}


class Remembering(Plain):
    """Keeps a moving average in a new tensor at every step."""

    def __init__(self, student):
        super().__init__(student)
        self.centre = torch.zeros(3)

    def forward_train(self, image, target, **kwargs):
        logits, losses = super().forward_train(image, target, **kwargs)
        self.centre = 0.9 * self.centre + 0.1 * logits.detach().mean(0)
        return logits, losses | {"loss_kd": (logits - self.centre).square().mean()}


class Drawing(Plain):
    def forward_train(self, image, target, **kwargs):
        logits, losses = super().forward_train(image, target, **kwargs)
        return logits, losses | {"loss_kd": losses["loss_kd"] * random.random()}


class Reading(Plain):
    def forward_train(self, image, target, **kwargs):
        logits, losses = super().forward_train(image, target, **kwargs)
        return logits, losses if losses["loss_kd"] > 1e6 else {"loss_ce": losses["loss_ce"]}


class Branching(Plain):
    def forward_train(self, image, target, epoch=1, **kwargs):
        logits, losses = super().forward_train(image, target, **kwargs)
        return logits, losses if epoch > 1 else {"loss_ce": losses["loss_ce"]}


class Hiding(Plain):
    """Counts in an object, where nobody looks."""

    def __init__(self, student):
        super().__init__(student)
        self.counter = iter(range(1, 1000))

    def forward_train(self, image, target, **kwargs):
        logits, losses = super().forward_train(image, target, **kwargs)
        return logits, losses | {"loss_kd": losses["loss_kd"] * next(self.counter)}


REFUSED = {
    Counting: "changes what Python holds of Counting: calls",
    Remembering: "changes what Python holds of Remembering: centre",
    Drawing: "draws random numbers on the host (python)",
    Reading: "synchronizing",
    Branching: "synchronizing",
    Hiding: "computes other numbers",
}


@pytest.mark.parametrize("method", [m for m in REFUSED if m is not Hiding])
def test_what_a_graph_cannot_follow_is_not_recorded_and_changes_nothing(method, tmp_path, recording, caplog):  # noqa: F811
    usual = trainer_of(tmp_path, *NEVER, name="usual", distiller=method(Net()))
    trainer = trainer_of(tmp_path, distiller=method(_same(usual)))
    with caplog.at_level("INFO"):
        trainer.train()
    (line,) = [r.message for r in caplog.records if "not recorded" in r.message]
    assert REFUSED[method] in line
    assert trainer.take_step.recorder is None and not recording.recorded
    usual.train()
    for name, tensor in student_of(usual).items():
        torch.testing.assert_close(student_of(trainer)[name], tensor, rtol=1e-6, atol=1e-7)


def _same(trainer):
    net = Net()
    net.load_state_dict(trainer.distiller.student.state_dict())
    return net


@pytest.mark.parametrize("method", REFUSED)
def test_what_cannot_be_recorded_is_refused_where_a_graph_is_asked_for(method, tmp_path, recording):  # noqa: F811
    trainer = trainer_of(tmp_path, distiller=method(Net()))
    trainer.take_step.required = True
    with pytest.raises(UserError, match=r"SOLVER\.CUDA_GRAPH always: .*; set SOLVER.CUDA_GRAPH auto or never") as error:
        trainer.train()
    assert REFUSED[method] in str(error.value)


@pytest.mark.parametrize("overrides", [NEVER, ()], ids=["usual", "recorded"])
def test_fp16_leaves_the_momentum_where_its_scale_is_too_large(overrides, tmp_path, recording, caplog):  # noqa: F811
    """torch's fused SGD, which runs on a GPU, would not."""
    trainer = trainer_of(tmp_path, *overrides, "SOLVER.AMP", "fp16")
    trainer.update.scaler._init_scale = 2.0**40
    trainer.distiller.train()
    with caplog.at_level("INFO"):
        taken(trainer, 3)
        assert all("momentum_buffer" not in trainer.optimizer.state[p] for p in trainer.update.parameters)
        losses = taken(trainer, 40)
    assert all(torch.tensor(losses).isfinite()) and trainer.update.scaler.get_scale() < 2.0**40
    assert ("the host sees whether SGD may take the step" in caplog.text) == (overrides == ())


def test_a_users_own_fused_sgd_is_refused_under_fp16(tmp_path):
    class Own(BaseTrainer):
        def init_optimizer(self, cfg):
            return torch.optim.SGD(self.distiller.get_learnable_parameters(), lr=0.1, fused=True)

    with pytest.raises(UserError, match=r"own SGD is fused.*fused=False"):
        trainer_of(tmp_path, "SOLVER.AMP", "fp16", cls=Own)


def test_an_optimizer_that_is_not_fused_is_not_recorded(tmp_path, recording, caplog):  # noqa: F811
    class Own(BaseTrainer):
        def init_optimizer(self, cfg):
            return torch.optim.SGD(self.distiller.get_learnable_parameters(), lr=0.1)

    with caplog.at_level("INFO"):
        trainer_of(tmp_path, cls=Own).train()
    assert "SGD is not fused" in caplog.text and not recording.recorded


def taken(trainer, steps, before=lambda step: None, epochs=1):
    """The losses of `steps` steps of each epoch, on its full batches again and again."""
    losses = []
    for epoch in range(1, epochs + 1):
        trainer.distiller.train()
        trainer.train_loader.set_epoch(epoch)
        batches = list(trainer.train_loader)[: STEPS - 1]
        for step in range(1, steps + 1):
            before((epoch, step))
            meters = Meters()
            trainer.train_iter(trainer.prepare_batch(batches[step % len(batches)], epoch), epoch, meters, step=step)
            losses.append(meters.means()["train_loss"])
    return losses


def compared(tmp_path, recording, before, steps=12, epochs=1):  # noqa: F811
    """The losses of a recorded run are those of the run itself, where `before(trainer)` acts before each step."""
    usual, trainer = trainer_of(tmp_path, *NEVER), trainer_of(tmp_path)
    own = [taken(t, steps, before(t), epochs) for t in (usual, trainer)]
    assert own[1] == pytest.approx(own[0], rel=1e-5)
    return trainer


def at(when, act):
    return lambda now: act() if now == when else None


def test_a_users_own_learning_rate_is_followed(tmp_path, recording):  # noqa: F811
    compared(tmp_path, recording, lambda t: at((1, 8), lambda: t.optimizer.param_groups[0].update(lr=0.001)))
    assert recording.recorded == 1


def test_other_settings_of_the_optimizer_are_recorded_anew(tmp_path, recording):  # noqa: F811
    compared(tmp_path, recording, lambda t: at((1, 8), lambda: t.optimizer.param_groups[0].update(weight_decay=0.1)))
    assert recording.recorded == 2


def test_settings_that_change_at_every_step_are_not_recorded_for_ever(tmp_path, recording, caplog):  # noqa: F811
    def before(trainer):
        return lambda now: trainer.optimizer.param_groups[0].update(weight_decay=0.001 * now[1])

    with caplog.at_level("INFO"):
        trainer = compared(tmp_path, recording, before, steps=20)
    assert recording.recorded == 3 and trainer.take_step.recorder is None and "at every step" in caplog.text


def test_a_weight_that_a_schedule_changes_within_an_epoch_is_followed(tmp_path, recording):  # noqa: F811
    class Weighted(Plain):
        weight = 1.0

        def forward_train(self, image, target, **kwargs):
            logits, losses = super().forward_train(image, target, **kwargs)
            return logits, losses | {"loss_kd": self.weight * losses["loss_kd"]}

    def before(trainer):
        return lambda now: setattr(trainer.distiller, "weight", 1.0 + now[1] // 6)

    usual = trainer_of(tmp_path, *NEVER, distiller=Weighted(Net()))
    trainer = trainer_of(tmp_path, distiller=Weighted(_same(usual)))
    own = [taken(t, 17, before(t)) for t in (usual, trainer)]
    assert own[1] == pytest.approx(own[0], rel=1e-5) and recording.recorded == 3


@pytest.mark.parametrize("of", ["module", "parameter", "optimizer"])
def test_hooks_are_python_code_and_are_not_recorded(of, tmp_path, recording, caplog):  # noqa: F811
    trainer, calls = trainer_of(tmp_path), []
    if of == "module":
        trainer.distiller.student.conv.register_forward_hook(lambda *_: calls.append(1))
    elif of == "parameter":
        trainer.distiller.student.conv.weight.register_hook(lambda _: calls.append(1))
    else:
        trainer.optimizer.register_step_post_hook(lambda *_: calls.append(1))
    with caplog.at_level("INFO"):
        taken(trainer, 8)
    assert not recording.recorded and "hooks, which are Python code" in caplog.text and len(calls) == 8


def test_layers_frozen_at_an_epochs_start_are_recorded_anew(tmp_path, recording):  # noqa: F811
    compared(
        tmp_path, recording, lambda t: at((2, 1), lambda: t.distiller.student.conv.requires_grad_(False)), 8, epochs=2
    )
    assert recording.recorded == 2


def test_a_loss_that_is_not_finite_is_named(tmp_path, recording):  # noqa: F811
    trainer = trainer_of(tmp_path)
    taken(trainer, 5)
    batch = trainer.prepare_batch(next(iter(trainer.train_loader)), 1)
    batch["image"][0] = float("nan")
    with pytest.raises(NonFiniteLossError, match="epoch 1, iteration 6: loss_ce = nan"):
        trainer.train_iter(batch, 1, Meters(), step=6)


def test_every_batch_counts_once_and_the_meters_are_apart(tmp_path, recording):  # noqa: F811
    trainer = trainer_of(tmp_path)
    trainer.distiller.train()
    meters, recent, sums = Meters(), Meters(), []
    for step, batch in enumerate(trainer.train_loader, start=1):
        own = Meters()
        trainer.train_iter(trainer.prepare_batch(batch, 1), 1, meters, recent, step)
        sums.append(recent.means()["train_loss"] * recent.count)
        recent.reset()
        del own
    assert meters.count == 44
    assert meters.means()["train_loss"] * 44 == pytest.approx(sum(sums), rel=1e-9)


def test_meters_of_the_past_keep_their_sums(tmp_path, recording):  # noqa: F811
    trainer = trainer_of(tmp_path)
    trainer.distiller.train()
    batch, kept = trainer.prepare_batch(next(iter(trainer.train_loader)), 1), []
    for step in range(1, 9):
        meters, recent = Meters(), Meters()
        trainer.train_iter(batch, 1, meters, *([recent] if step % 2 else []), step=step)
        kept.append((meters, recent, meters.means(), recent.means()))
    assert recording.recorded == 1
    assert all(m.means() == then and r.means() == recently for m, r, then, recently in kept)
    losses = [then["train_loss"] for _, _, then, _ in kept]
    assert len(set(losses)) == len(losses) and all(bool(now) == (i % 2 == 0) for i, (*_, now) in enumerate(kept))


def test_in_place_sums():
    names, buffer, meters = ("a", "b"), torch.full((2,), 7.0, dtype=torch.float64), Meters()
    meters.hold(names, buffer)
    buffer += torch.tensor([1.0, 2.0])
    meters.count += 2
    assert meters.means() == {"a": 0.5, "b": 1.0}
    meters.add(2, names, torch.tensor([3.0, 2.0], dtype=torch.float64))
    assert meters.means() == {"a": 1.0, "b": 1.0} and buffer.tolist() == [1.0, 2.0]
    meters.hold(names, buffer)
    assert buffer.tolist() == [4.0, 4.0]


def test_batch_norms_statistics_and_dropout_follow(tmp_path, recording):  # noqa: F811
    class Normed(Net):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(4)

        def forward(self, image):
            pooled = self.norm(self.conv(image)).mean((2, 3))
            return self.fc(pooled), {"pooled_feat": pooled}

    torch.manual_seed(3)
    first = Normed()
    second = Normed()
    second.load_state_dict(first.state_dict())
    usual = trainer_of(tmp_path, *NEVER, distiller=Plain(first), name="usual")
    trainer = trainer_of(tmp_path, distiller=Plain(second))
    usual.train(), trainer.train()
    assert recording.recorded == 1
    for name, tensor in student_of(usual).items():
        torch.testing.assert_close(student_of(trainer)[name], tensor, rtol=1e-5, atol=1e-6)
    assert student_of(trainer)["norm.num_batches_tracked"] == 2 * STEPS
    assert BATCH * (STEPS - 1) < 44
