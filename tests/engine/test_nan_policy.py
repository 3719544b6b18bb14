"""NaN policies, step by step: one decision a step, on the losses and on the gradients, before the update."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mdistiller.distillers import Distiller
from mdistiller.distributed.ranks import Ranks
from mdistiller.engine import nan_watch
from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.kept_buffers import KeptBuffers
from mdistiller.engine.nan_watch import NonFiniteLossError, Outcome, nan_policy_dict
from mdistiller.engine.split_update import AlignedUpdate, DotUpdate
from mdistiller.engine.step import Step
from mdistiller.engine.update import SumUpdate
from mdistiller.errors import UserError
from mdistiller.models import build_model, cifar_model_dict

from .._networks import NanGradient

CPU = torch.device("cpu")


# What goes wrong, as a function of the loss.
FAULTS = {"loss": lambda x: x * torch.nan, "gradient": NanGradient.apply, "infinite": lambda x: x + torch.inf}


class TwoTerms(Distiller):
    """Cross-entropy and a penalty, in which a fault occurs at the forward passes `bad` (from 1): {number: fault}."""

    def __init__(self, bad):
        torch.manual_seed(0)
        super().__init__(build_model(cifar_model_dict, "resnet8", 10), torch.nn.Identity())
        self.bad, self.passes, self.after = bad, 0, 0
        self.register_buffer("bank", torch.zeros(3))

    def forward_train(self, image, target, **kwargs):
        self.passes += 1
        logits, _ = self.student(image)
        penalty = 0.01 * logits.square().mean()
        if self.passes in self.bad:
            penalty = FAULTS[self.bad[self.passes]](penalty)
        return logits, {"loss_ce": torch.nn.functional.cross_entropy(logits, target), "loss_kd": penalty}

    def after_step(self):
        self.bank += 1


def step_of(folder, policy, bad, *overrides, rule=SumUpdate):
    cfg = load_cfg(
        "configs/digits/vanilla.yaml",
        [
            *("SOLVER.NAN_POLICY", policy, "SOLVER.NAN_LIMIT", "2", "SOLVER.BATCH_SIZE", "8", "SOLVER.LR", "0.01"),
            *overrides,
        ],
    )
    distiller = TwoTerms(bad).train()
    ranks = Ranks()
    own = nan_policy_dict[policy](folder, distiller, CPU, ranks, cfg)
    update = rule(distiller.get_learnable_parameters(), cfg)
    return Step(distiller, update, own, None, None, CPU, ranks, cfg)


def batch(number):
    g = torch.Generator().manual_seed(number)
    index = torch.arange(8) + 8 * number
    return {"image": torch.rand(8, 3, 32, 32, generator=g), "target": torch.arange(8) % 10, "index": index}


def take(step, steps):
    """Whether each step was taken, and the state before each and after the last one."""
    states, taken = [], []
    for number in range(1, steps + 1):
        states.append({k: v.clone() for k, v in step.distiller.state_dict().items()})
        taken.append(step(batch(number), 1, number) is not None)
    states.append({k: v.clone() for k, v in step.distiller.state_dict().items()})
    return taken, states


def equal(one, other):
    return all(torch.equal(v, other[k]) for k, v in one.items())


MODES = {
    "plain": ((), SumUpdate),
    "clipped": (("SOLVER.CLIP_GRAD_NORM", "1.0"), SumUpdate),
    "AdamW": (("SOLVER.TYPE", "AdamW"), SumUpdate),
    "DOT": ((), DotUpdate),
    "aligned": ((), AlignedUpdate),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("mode", MODES)
def test_a_bad_step_has_no_effect(mode, fault, tmp_path):
    """The run goes on as if the bad batch had not been there, bit for bit; also where it is the first one."""
    overrides, rule = MODES[mode]
    for bad in (1, 2, 3):
        step = step_of(tmp_path, "skip", {bad: fault}, *overrides, rule=rule)
        taken, states = take(step, 4)
        assert taken == [number != bad for number in range(1, 5)]
        assert equal(states[bad - 1], states[bad]) and step.distiller.bank.tolist() == [3.0] * 3
        clean = step_of(tmp_path, "skip", {}, *overrides, rule=rule)
        for number in range(1, 5):
            if number != bad:
                clean(batch(number), 1, number)
        assert equal(clean.distiller.state_dict(), states[-1])
        assert (step.nan_policy.skipped, step.nan_policy.in_a_row) == (1, 0)


def test_a_good_micro_batch_does_not_reset_the_counter(tmp_path):
    """Of two micro-batches a step, the second one is bad."""
    step = step_of(tmp_path, "skip", {2: "gradient", 4: "loss", 6: "gradient"}, "SOLVER.ACCUMULATE", "2")
    assert take(step, 2)[0] == [False, False] and step.nan_policy.in_a_row == 2
    with pytest.raises(NonFiniteLossError, match=r"iteration 3: loss_ce = \d.*, loss_kd = \d.*gradients' norm is nan"):
        step(batch(3), 1, 3)
    assert json.loads((tmp_path / "non_finite.json").read_text())["index"] == list(range(24, 32))


def test_a_list_that_cannot_be_written_does_not_hide_the_loss(tmp_path):
    """A folder stands where the list belongs; a full or a read-only disk gives the same kind of error."""
    (tmp_path / "non_finite.json").mkdir()
    step = step_of(tmp_path, "stop", {1: "loss"})
    with pytest.raises(NonFiniteLossError, match=r"iteration 1: .*non_finite\.json cannot be written .Is a directory"):
        take(step, 1)
        step.nan_policy.check()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("every", [1, 50])
def test_stop_names_the_step_whose_gradient_is_not_finite(mode, every, tmp_path, monkeypatch):
    """At once on a CPU, before the update; on a GPU, which is read every 50 steps, the right one of those."""
    overrides, rule = MODES[mode]
    step = step_of(tmp_path, "stop", {3: "gradient"}, *overrides, rule=rule)
    step.nan_policy.every = every
    with pytest.raises(NonFiniteLossError, match=r"epoch 1, iteration 3: .*norm is nan; the batch's images") as error:
        take(step, 5)
        step.nan_policy.check()
    assert "nan" not in str(error.value).split("; the batch")[0].split(", the gradients")[0]
    note = json.loads((tmp_path / "non_finite.json").read_text())
    assert note["iteration"] == 3 and note["grad_norm"] == "nan" and note["index"] == list(range(24, 32))
    finite = all(v.isfinite().all() for v in step.distiller.state_dict().values())
    assert finite == (every == 1)


def test_fp16s_search_for_its_scale_counts_as_no_bad_step(tmp_path):
    """A scale of 2^127 overflows: the scaler halves it, skips and is not stopped; a NaN loss leaves the scale."""
    for policy in ("stop", "skip"):
        step = step_of(tmp_path, policy, {4: "loss"} if policy == "skip" else {}, "SOLVER.AMP", "fp16")
        scaler = step.update.scaler
        scaler._init_scale = 2.0**127
        scales = []
        for number in range(1, 6):
            before = {k: v.clone() for k, v in step.distiller.student.named_parameters()}
            result = step(batch(number), 1, number)
            scales.append(scaler.get_scale())
            assert (result is None) == (policy == "skip" and number == 4)
            if scales[-1] < (scales[-2] if number > 1 else 2.0**127):
                assert equal(dict(step.distiller.student.named_parameters()), before)
        assert scales[0] == 2.0**126, "the first step overflows"
        if policy == "skip":
            assert scales[3] == scales[2] and step.nan_policy.skipped == 1


def test_fp16_whose_scale_is_not_to_blame_is_a_bad_step(tmp_path):
    step = step_of(tmp_path, "stop", {1: "gradient", 2: "gradient"}, "SOLVER.AMP", "fp16")
    step.update.scaler._init_scale = 1.0
    assert step(batch(1), 1, 1) is not None  # the scaler halves it
    with pytest.raises(NonFiniteLossError, match=r"iteration 2: .*norm is nan"):
        step(batch(2), 1, 2)


def test_the_norm_that_clips_in_fp16_is_that_of_the_unscaled_gradients(tmp_path):
    """The first step of plain SGD is then as long as LR times the norm allows; and clipping agrees with float32's."""
    lengths = []
    for amp in ("fp16", "none"):
        plain = ("SOLVER.MOMENTUM", "0.0", "SOLVER.WEIGHT_DECAY", "0.0", "SOLVER.CLIP_GRAD_NORM", "0.1")
        step = step_of(tmp_path, "stop", {}, "SOLVER.AMP", amp, *plain)
        if step.update.scaler:
            step.update.scaler._init_scale = 256.0  # does not overflow
        before = torch.cat([p.detach().flatten() for p in step.distiller.student.parameters()])
        result = step(batch(1), 1, 1)
        after = torch.cat([p.detach().flatten() for p in step.distiller.student.parameters()])
        lengths.append((after - before).norm().item())
        assert result.grad_norm > 0.1
    assert lengths == pytest.approx([0.001, 0.001], rel=1e-2)


class Readings(TorchDispatchMode):
    """Counts the operations that make the host wait for the device: reading a number of a tensor."""

    def __init__(self):
        super().__init__()
        self.count = self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        # `tolist` and `isfinite().all()` end in these.
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("policy", "most"), [("skip", 1), ("stop", 0)])
def test_how_often_a_step_waits_for_the_device(policy, most, tmp_path):
    """Under `stop`, as on a GPU; the first steps, which check and learn, may read more."""
    step = step_of(tmp_path, policy, {}, "SOLVER.CLIP_GRAD_NORM", "1.0")
    step.nan_policy.every = 50
    take(step, 3)
    reads = []
    # tolist() reads numbers past the dispatcher.
    tolist = torch.Tensor.tolist
    try:
        torch.Tensor.tolist = lambda self: (reads.append(1), tolist(self))[1]
        with Readings() as readings:
            for number in (4, 5):
                step(batch(number), 1, number)
    finally:
        torch.Tensor.tolist = tolist
    assert len(reads) + readings.count == 2 * most


class Buffers(Distiller):
    """A BatchNorm that trains, one that begins to, a bank, a small counter, a teacher."""

    def __init__(self):
        super().__init__(torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2))
        self.late = torch.nn.BatchNorm1d(2).eval()
        self.register_buffer("bank", torch.zeros(2**16 + 1))
        self.register_buffer("counter", torch.zeros(()))

    def step(self):
        self.late(self.student(torch.rand(4, 2)))
        self.teacher(torch.rand(4, 2))


def test_neither_large_buffers_nor_those_of_frozen_networks_are_copied():
    method = Buffers().train()
    kept = KeptBuffers(method)
    for _ in range(2):
        kept.keep()
        method.step()
        kept.learn()
        method.bank += 1  # after the step
    copied = [(type(place.module).__name__, place.name) for place in kept._copied]
    assert ("Buffers", "counter") in copied and ("Buffers", "bank") not in copied and len(copied) == 1 + 2 * 3


def test_a_buffer_that_begins_to_change_in_a_bad_step_is_put_back():
    """An auxiliary head's BatchNorm, say, of which the first batch is not finite."""
    method = Buffers().train()
    kept = KeptBuffers(method)
    kept.keep()
    method.step()
    kept.learn()
    before = {k: v.clone() for k, v in method.state_dict().items()}
    method.late.train()
    kept.keep()
    method.step()
    method.counter += torch.nan
    kept.restore()
    assert equal(method.state_dict(), before)


@pytest.mark.parametrize("change", [lambda m: m.bank.add_(1), lambda m: m.teacher.train()(torch.rand(4, 2))])
def test_what_cannot_be_put_back_is_named(change):
    method = Buffers().train()
    kept = KeptBuffers(method)
    kept.keep()
    method.step()
    kept.learn()
    kept.keep()
    change(method)
    with pytest.raises(UserError, match=r"cannot undo what Buffers has done to the buffer '(bank|num_)"):
        kept.restore()


def test_the_window_is_checked_when_it_is_full_and_when_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(nan_watch, "_EVERY", 3)
    cfg = load_cfg("configs/digits/vanilla.yaml", [])
    policy = nan_policy_dict["stop"](tmp_path, None, torch.device("cuda"), Ranks(), cfg)

    def outcome(step, value):
        return Outcome(1, step, ("ce",), torch.tensor([value]), torch.tensor(1.0), torch.arange(2))

    for step in range(1, 7):
        assert not policy.drops(outcome(step, 1.0))
    assert not policy.drops(outcome(7, torch.inf)) and not policy.drops(outcome(8, torch.nan))
    with pytest.raises(NonFiniteLossError, match="iteration 7: ce = inf;"):
        policy.drops(outcome(9, 1.0))
    policy.drops(outcome(10, torch.nan))
    with pytest.raises(NonFiniteLossError, match="iteration 10: ce = nan"):
        policy.check()
    policy.check()
