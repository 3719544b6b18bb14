"""SOLVER.COMPILE: one graph for the whole training, and the same step in every other mode."""

import json

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mdistiller.engine.build import build_trainer
from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.meters import Meters

from .._networks import write_untrained


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compile")
    write_untrained(folder / "resnet8", "resnet8", seed=1)
    (folder / "groups.json").write_text(json.dumps([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]))
    return folder


@pytest.fixture
def graphs(monkeypatch):
    """Counts the compiled graphs. They are not turned into machine code, which takes half a minute each."""
    torch._dynamo.reset()
    counter, compile_ = CompileCounterWithBackend("aot_eager"), torch.compile

    def counted(function, mode=None, **options):
        assert mode is None, "CUDA graphs are for GPUs"
        return compile_(function, backend=counter, **options)

    monkeypatch.setattr(torch, "compile", counted)
    yield counter
    torch._dynamo.reset()


def trained(files, epochs, steps, *overrides):
    """The student's parameters and the epochs' mean losses after `steps` of an epoch, and its last, short one."""
    cfg = load_cfg(
        "configs/digits/kd.yaml",
        [
            *("LOG.WANDB", "False", "LOG.PREFIX", str(files), "EXPERIMENT.DEVICE", "cpu", "EXPERIMENT.SEED", "0"),
            *("DISTILLER.TEACHER", "resnet8", "DISTILLER.TEACHER_CKPT", str(files / "resnet8"), "CRD.NCE.K", "32"),
            *("DATASET.TRAIN_FRACTION", "0.1", "SOLVER.BATCH_SIZE", "16", "SOLVER.LR", "0.001", *overrides),
        ],
    )
    trainer = build_trainer(cfg)
    trainer.distiller.train()
    means = []
    for epoch in range(1, epochs + 1):
        trainer.train_loader.set_epoch(epoch)
        meters, batches = Meters(), list(trainer.train_loader)
        assert len(batches[-1][1]) == 15
        for number, batch in enumerate([*batches[:steps], batches[-1]], start=1):
            trainer.train_iter(trainer.prepare_batch(batch, epoch), epoch, meters, step=number)
        means.append(meters.means())
    return dict(trainer.distiller.student.named_parameters()), means


COMPILE = ("SOLVER.COMPILE", "True")
# What the step is beyond KD, and how many graphs that takes: one for each size of the full batch's micro-batches.
MODES = {
    "DKD": (("DISTILLER.TYPE", "DKD"), 1),
    "three micro-batches": (("SOLVER.ACCUMULATE", "3"), 2),  # 6, 6 and 4
    "two micro-batches": (("SOLVER.ACCUMULATE", "2"), 1),
    "DOT": (("SOLVER.TRAINER", "dot"), 1),
    "DeepKD": (("SOLVER.TRAINER", "deepkd"), 1),
    "aligned": (("SOLVER.TRAINER", "aligned"), 1),
    "DOT, CRD": (("SOLVER.TRAINER", "crd_dot", "DISTILLER.TYPE", "CRD"), 1),
    "FitNet": (("DISTILLER.TYPE", "FITNET"), 1),
    "skip, EMA, clipped": (("SOLVER.NAN_POLICY", "skip", "SOLVER.EMA", "0.9", "SOLVER.CLIP_GRAD_NORM", "1.0"), 1),
    "bf16": (("SOLVER.AMP", "bf16"), 1),
    "teacher cache": (("DISTILLER.TEACHER_CACHE", "{files}/cache"), 2),  # before and after it is read
    "teacher cache in memory": (("DISTILLER.TEACHER_CACHE_DEVICE", "device"), 1),
}


# Where the cache is read, the graph ends; torch looks at `.grad` of what passes between.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("mode", [pytest.param(m, marks=() if m == "DKD" else pytest.mark.slow) for m in MODES])
def test_one_graph_serves_three_epochs_with_short_last_batches(mode, files, graphs):
    overrides, count = MODES[mode]
    overrides = [value.format(files=files) for value in overrides]
    plain, plain_means = trained(files, 3, 2, *overrides)
    assert graphs.frame_count == 0
    compiled, means = trained(files, 3, 2, *overrides, *COMPILE)
    assert graphs.frame_count == count
    for one, other in zip(plain_means, means, strict=True):
        assert other == pytest.approx(one, rel=2e-3 if mode == "bf16" else 1e-4, abs=1e-6)
    distance = max((compiled[name] - p).abs().max().item() for name, p in plain.items())
    assert distance < 1e-4
