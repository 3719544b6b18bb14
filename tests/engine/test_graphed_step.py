"""SOLVER.CUDA_GRAPH: the recorded step against the step itself, and what is not recorded."""

import json

import pytest
import torch

from mdistiller.engine import optimizers, trainer as trainer_module
from mdistiller.engine.build import build_trainer
from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.meters import Meters
from mdistiller.distillers import distiller_dict

from .._networks import write_untrained
from ._recorder import TracingRecorder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graph")
    write_untrained(folder / "resnet8", "resnet8", seed=1)
    (folder / "groups.json").write_text(json.dumps([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]))
    return folder


@pytest.fixture
def recorder(monkeypatch):
    """Stands in for a GPU's; optimizers are fused, as they are there."""
    own = TracingRecorder()


    def recorder_for(device, cfg, obstacle):
        return None if cfg.SOLVER.CUDA_GRAPH == "never" or (obstacle and "no GPU" not in obstacle) else own

    monkeypatch.setattr(trainer_module, "recorder_for", recorder_for)
    monkeypatch.setattr(optimizers, "_fused", lambda groups: True)
    return own


def made(files, *overrides):
    cfg = load_cfg(
        "configs/digits/kd.yaml",
        [
            *("LOG.WANDB", "False", "LOG.PREFIX", str(files), "EXPERIMENT.DEVICE", "cpu", "EXPERIMENT.SEED", "0"),
            *("DISTILLER.TEACHER", "resnet8", "DISTILLER.TEACHER_CKPT", str(files / "resnet8"), "CRD.NCE.K", "32"),
            *("DATASET.TRAIN_FRACTION", "0.1", "SOLVER.BATCH_SIZE", "16", "SOLVER.LR", "0.01"),
            *("DCGD.GROUPS", str(files / "groups.json"), *overrides),
        ],
    )
    return build_trainer(cfg)


def trained(trainer, epochs=3, steps=6):
    """What is left after some epochs of `steps` full batches and the short last one: weights, means, states."""
    from mdistiller.engine.lr_schedule import adjust_learning_rate

    means = []
    for epoch in range(1, epochs + 1):
        trainer.distiller.train()
        trainer.train_loader.set_epoch(epoch)
        meters, recent, batches = Meters(), Meters(), list(trainer.train_loader)
        assert len(batches[-1][1]) == 15
        for number, batch in enumerate([*batches[:steps], batches[-1]], start=1):
            adjust_learning_rate(epoch, trainer.cfg, trainer.optimizer, number - 1, steps + 1)
            trainer.train_iter(trainer.prepare_batch(batch, epoch), epoch, meters, recent, number, number % 2 == 0)
            if number == 4:
                means.append(recent.means())
                recent.reset()
        means += [meters.means(), recent.means()]
    state = trainer.distiller.state_dict()
    if trainer.ema:
        state |= {f"ema.{k}": v for k, v in trainer.ema.network.state_dict().items()}
    return {k: v.clone() for k, v in state.items()}, means


@pytest.mark.parametrize("method", sorted(distiller_dict))
def test_every_method(method, files, recorder):
    overrides = ("DISTILLER.TYPE", method, "SOLVER.LR_DECAY_STAGES", "[1, 2]", "SOLVER.WARMUP_EPOCHS", "1")
    plain, means = trained(made(files, *overrides, "SOLVER.CUDA_GRAPH", "never"))
    assert recorder.recorded == 0
    replayed, own = trained(made(files, *overrides))
    assert recorder.recorded == 1
    for one, other in zip(means, own, strict=True):
        assert other == pytest.approx(one, rel=1e-5, abs=1e-6)
    for name, tensor in plain.items():
        torch.testing.assert_close(replayed[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
