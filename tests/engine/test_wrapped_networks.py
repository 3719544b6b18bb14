"""A training whose networks are of another library: recorded as one CUDA graph, folded, averaged, saved."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mdistiller.engine.build import build_trainer
from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.meters import Meters
from mdistiller.models import cifar_model_dict
from mdistiller.models.wrapped import WrappedNetwork, wrap

from ..models.test_wrapped import Small
from ._recorder import recording  # noqa: F401
from .test_graphed_methods import NEVER, STEPS, trained


def wrapped(num_classes):
    net = Small(num_classes)
    net.drop = torch.nn.Identity()  # a Dropout draws on the host, where there is no GPU
    return wrap(net, num_classes, 32)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """made(*overrides): a trainer whose student and teacher are wrapped networks."""
    monkeypatch.setitem(cifar_model_dict, "wrapped", (wrapped, None))
    torch.manual_seed(1)
    torch.save({"model": Small(10).state_dict()}, tmp_path / "teacher")  # the bare network's own weights

    def make(*overrides):
        cfg = load_cfg(
            "configs/digits/kd.yaml",
            [
                *("LOG.WANDB", "False", "LOG.PREFIX", str(tmp_path), "EXPERIMENT.DEVICE", "cpu"),
                *("EXPERIMENT.SEED", "0"),
                *("DISTILLER.TEACHER", "wrapped", "DISTILLER.TEACHER_CKPT", str(tmp_path / "teacher")),
                *("DISTILLER.STUDENT", "wrapped", "DATASET.TRAIN_FRACTION", "0.1", "SOLVER.BATCH_SIZE", "16"),
                *("SOLVER.LR", "0.001", "SOLVER.LR_DECAY_STAGES", "[1, 2]", "SOLVER.WARMUP_EPOCHS", "1"),
                # torch 2.14 corrupts its heap in the backward pass of the unwrapped network with channels last.
                *("SOLVER.CHANNELS_LAST", "False", *overrides),
            ],
        )
        return build_trainer(cfg)

    return make


@pytest.mark.parametrize("method", ["KD", "FITNET"])
def test_the_step_is_recorded_and_computes_the_same(method, made, recording):  # noqa: F811
    plain, means = trained(made("DISTILLER.TYPE", method, *NEVER))
    trainer = made("DISTILLER.TYPE", method)
    assert isinstance(trainer.distiller.student, WrappedNetwork)
    replayed, own = trained(trainer)
    assert recording.recorded == 1 and trainer.take_step.recording.replays == 3 * STEPS - 3
    for one, other in zip(means, own, strict=True):
        assert other == pytest.approx(one, rel=1e-5, abs=1e-6)
    for name, tensor in plain.items():
        torch.testing.assert_close(replayed[name], tensor, rtol=1e-4, atol=1e-5)


def test_the_step_compiles_as_one_function(made):
    trainer = made(*NEVER)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    student = torch.compile(trainer.distiller.student, fullgraph=True, backend=counter)
    batch = next(iter(trainer.train_loader))[0]
    student(batch.float())
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_the_teacher_runs_as_a_folded_copy(made):
    trainer = made(*NEVER)
    trainer.distiller.train()
    batch = trainer.prepare_batch(next(iter(trainer.train_loader)), 1)
    trainer.train_iter(batch, 1, Meters(), step=1)
    assert trainer.step.frozen.words["teacher"].startswith("a copy with its BatchNorms folded")


def test_ema_and_the_saved_student_have_the_bare_networks_names(made):
    trainer = made("SOLVER.EMA", "0.9", *NEVER)
    trained(trainer, epochs=1)
    student = trainer.distiller.network_to_save("student")
    Small(10).load_state_dict(student.state_dict(), strict=True)
    names = [key for key in trainer.distiller.state_dict() if key.startswith("student.")]
    assert names == [f"student.{key}" for key in Small(10).state_dict()]
