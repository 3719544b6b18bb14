"""SOLVER.CUDA_GRAPH with every registered method: the recorded step's numbers, and that it is one function.

A CUDA graph needs a step in which the host decides nothing. Two tracers that refuse anything else see the whole of it:
`make_fx`, whose trace is replayed in place of the step, and torch.compile with `fullgraph=True`, which must not compile
anew when the epoch or the learning rate changes.
"""

import json

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend

from mdistiller.distillers import distiller_dict
from mdistiller.engine import optimizers
from mdistiller.engine.build import build_trainer
from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.lr_schedule import adjust_learning_rate
from mdistiller.engine.meters import Meters

from .._networks import write_untrained
from ._recorder import recording  # noqa: F401

STEPS = 5  # full batches of an epoch that are trained on, before its short last one
NEVER = ("SOLVER.CUDA_GRAPH", "never")
FAST = ("KD",)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graph")
    write_untrained(folder / "resnet8", "resnet8", seed=1)
    (folder / "groups.json").write_text(json.dumps([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]))
    return folder


def made(files, *overrides):
    cfg = load_cfg(
        "configs/digits/kd.yaml",
        [
            *("LOG.WANDB", "False", "LOG.PREFIX", str(files), "EXPERIMENT.DEVICE", "cpu", "EXPERIMENT.SEED", "0"),
            *("DISTILLER.TEACHER", "resnet8", "DISTILLER.TEACHER_CKPT", str(files / "resnet8"), "CRD.NCE.K", "32"),
            *("DATASET.TRAIN_FRACTION", "0.1", "SOLVER.BATCH_SIZE", "16", "SOLVER.LR", "0.001", "DCGD.GROUPS"),
            *(str(files / "groups.json"), "SOLVER.LR_DECAY_STAGES", "[1, 2]", "SOLVER.WARMUP_EPOCHS", "1", *overrides),
        ],
    )
    return build_trainer(cfg)


def trained(trainer, epochs=3):
    """The distiller's state after some epochs, and each epoch's means."""
    means = []
    for epoch in range(1, epochs + 1):
        trainer.distiller.train()
        trainer.train_loader.set_epoch(epoch)
        meters, batches = Meters(), list(trainer.train_loader)
        assert len(batches[-1][1]) == 15
        for number, batch in enumerate([*batches[:STEPS], batches[-1]], start=1):
            adjust_learning_rate(epoch, trainer.cfg, trainer.optimizer, number - 1, STEPS + 1)
            trainer.train_iter(trainer.prepare_batch(batch, epoch), epoch, meters, step=number)
        means.append(meters.means())
    return {name: tensor.clone() for name, tensor in trainer.distiller.state_dict().items()}, means


def some(values):
    """Parameters of a test: `FAST` ones in the fast tests."""
    return [pytest.param(value, marks=() if value in FAST else pytest.mark.slow) for value in values]


@pytest.mark.parametrize("method", some(sorted(distiller_dict)))
def test_every_method_is_recorded_once_and_computes_the_same(method, files, recording):  # noqa: F811
    plain, means = trained(made(files, "DISTILLER.TYPE", method, *NEVER))
    assert recording.recorded == 0
    trainer = made(files, "DISTILLER.TYPE", method)
    replayed, own = trained(trainer)
    assert recording.recorded == 1 and trainer.take_step.recording.replays == 3 * STEPS - 3
    for one, other in zip(means, own, strict=True):
        assert other == pytest.approx(one, rel=1e-5, abs=1e-6)
    for name, tensor in plain.items():
        message = lambda m, name=name: f"{name}: {m}"  # noqa: E731
        torch.testing.assert_close(replayed[name], tensor, rtol=1e-4, atol=1e-5, msg=message)


def test_the_teachers_outputs_are_looked_up_in_the_graph(files, recording):  # noqa: F811
    """Each epoch shows other crops, so that a row of another epoch would be another image's."""
    memory = ("DISTILLER.TEACHER_CACHE_DEVICE", "device")
    _, means = trained(made(files, *memory, *NEVER))
    trainer = made(files, *memory)
    _, own = trained(trainer)
    assert recording.recorded == 1 and trainer.take_step.recording.replays == 3 * STEPS - 3
    for one, other in zip(means, own, strict=True):
        assert other == pytest.approx(one, rel=1e-5, abs=1e-6)
    assert trainer.step.teacher_cache.hit_rate() < 5  # nearly every crop of an epoch is a new one


def test_the_teachers_weights_are_read_in_two_steps_of_an_epoch(files, recording, monkeypatch):  # noqa: F811
    trainer, thoroughly = made(files), []
    frozen, check = trainer.step.frozen, trainer.step.frozen.check
    monkeypatch.setattr(frozen, "check", lambda **how: (thoroughly.append(how["thoroughly"]), check(**how)))
    trained(trainer, epochs=2)
    assert recording.recorded == 1 and thoroughly.count(True) == 4


class PlainSGD:
    """The optimizer `own`, a torch.optim.SGD, in plain operations. torch's own ends a graph of torch.compile."""

    def __init__(self, own):
        self.own, self.param_groups = own, own.param_groups

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.own.state[p]["momentum_buffer"]
                    momentum.mul_(group["momentum"]).add_(p.grad + group["weight_decay"] * p)
                    p.sub_(group["lr"] * momentum)

    def zero_grad(self, set_to_none=True):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None


@pytest.fixture
def whole_graphs(monkeypatch):
    """Counts the graphs of torch.compile, in which backward passes are traced too."""
    config = torch._dynamo.config
    if not hasattr(config, "trace_autograd_ops"):
        pytest.skip("this torch traces no backward pass within a function")
    monkeypatch.setattr(optimizers, "_fused", lambda groups: True)
    torch._dynamo.reset()
    with config.patch(trace_autograd_ops=True):
        yield CompileCounterWithBackend("eager")
    torch._dynamo.reset()


MODES = {
    "EMA, clipped, micro-batches": ("SOLVER.EMA", "0.9", "SOLVER.CLIP_GRAD_NORM", "1.0", "SOLVER.ACCUMULATE", "2"),
    "bf16": ("SOLVER.AMP", "bf16"),
}
WHOLE = {method: ("DISTILLER.TYPE", method) for method in sorted(distiller_dict)} | MODES


@pytest.mark.filterwarnings("ignore:Profiler record function")
@pytest.mark.parametrize("case", some(WHOLE))
def test_the_step_is_one_function_for_all_epochs(case, files, whole_graphs):
    trainer = made(files, *WHOLE[case], *NEVER)
    trainer.distiller.train()
    batches = [trainer.prepare_batch(batch, 1) for batch, _ in zip(trainer.train_loader, range(STEPS))]
    for number, batch in enumerate(batches[:-1], start=1):
        trainer.train_iter(batch, 1, Meters(), step=number)
    rates, epoch = trainer.update.rates(), torch.tensor(1)
    trainer.update.optimizer = PlainSGD(trainer.optimizer)
    step = trainer.step
    changed = [*trainer.distiller.state_dict().values(), *trainer.update.optimizer.own.state_dict()["state"].values()]
    changed = [t for c in changed for t in (c.values() if isinstance(c, dict) else [c])]
    before = [t.clone() for t in changed]
    rows = {}
    functions = {"usual": step.whole, "one": torch.compile(step.whole, fullgraph=True, backend=whole_graphs)}
    for name, function in functions.items():
        rows[name] = []
        for now in (1, 2, 3):
            epoch.fill_(now)
            for rate in rates:
                rate.fill_(0.001 / now)
            names, sums, norms = function(batches[-1], epoch)
            rows[name].append(torch.cat([sums, norms]))
        with torch.no_grad():
            torch._foreach_copy_(changed, before)
    assert whole_graphs.frame_count == 1 and names
    tolerance = 2e-2 if case == "bf16" else 1e-5
    torch.testing.assert_close(torch.stack(rows["one"]), torch.stack(rows["usual"]), rtol=tolerance, atol=1e-6)
