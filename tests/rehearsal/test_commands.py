"""What runs trained networks, and what resumes a run, on the fake GPU: the results are those of the CPU."""

import json

import numpy as np
import pytest
import torch

from mdistiller.commands.eval import evaluate_checkpoint
from mdistiller.commands.group_classes import group_classes
from mdistiller.commands.inspect_features import network_outputs

from .._networks import write_untrained
from ._fake_gpu import FakeGPU
from ._runs import trainer_for


@pytest.fixture
def resnet8(tmp_path):
    return str(write_untrained(tmp_path / "resnet8", "resnet8", seed=1))


def on_both(run):
    """`run(device)` on the CPU and on the fake GPU."""
    theirs = run("cpu")
    with FakeGPU():
        return theirs, run("cuda")


def test_eval(resnet8):
    theirs, ours = on_both(
        lambda device: evaluate_checkpoint("resnet8", resnet8, "digits", 64, num_workers=0, device=device)
    )
    assert ours.splitlines()[0] == theirs.splitlines()[0] and " images/s on cuda:0" in ours


@pytest.mark.slow
@pytest.mark.parametrize("split", ["heldout", "kfold"])
def test_group_classes(split, resnet8, tmp_path):
    def run(device):
        out = tmp_path / device / "groups.json"
        group_classes("resnet8", resnet8, "digits", 3, out, split=split, num_workers=0, device=device)
        return json.loads(out.read_text())

    theirs, ours = on_both(run)
    assert ours["groups"] == theirs["groups"] and ours["confusion"] == theirs["confusion"]


@pytest.mark.slow
def test_inspect_features(resnet8):
    theirs, ours = on_both(lambda device: network_outputs("resnet8", resnet8, "digits", num_workers=0, device=device))
    np.testing.assert_allclose(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)
    for one, other in zip(ours.stages, theirs.stages, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


MODES = {
    "plain": (),
    "bf16, EMA, clipping": ("SOLVER.AMP", "bf16", "SOLVER.EMA", 0.9, "SOLVER.CLIP_GRAD_NORM", 1.0),
    "AdamW, micro-batches": ("SOLVER.TYPE", "AdamW", "SOLVER.LR", 0.001, "SOLVER.ACCUMULATE", 3),
    "DOT, skip": ("SOLVER.TRAINER", "dot", "SOLVER.NAN_POLICY", "skip"),
}
EVERY_MODE = pytest.mark.parametrize("mode", MODES)


def trained(folder, *overrides, resume=False):
    """The student's state after a run."""
    folder.mkdir(exist_ok=True)
    trainer = trainer_for(folder, "KD", "resnet8", "resnet8", "SOLVER.LR", 0.001, *overrides)
    trainer.train(resume)
    return {name: tensor.cpu() for name, tensor in trainer.distiller.student.state_dict().items()}


@pytest.mark.slow
@EVERY_MODE
def test_a_run_gives_the_numbers_of_the_cpu(mode, tmp_path):
    theirs = trained(tmp_path / "cpu", "EXPERIMENT.DEVICE", "cpu", *MODES[mode])
    with FakeGPU():
        ours = trained(tmp_path / "gpu", *MODES[mode])
    loose = {"rtol": 0.1, "atol": 0.02} if "bf16" in mode else {"rtol": 1e-3, "atol": 1e-4}
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, **loose, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.slow
@EVERY_MODE
def test_a_resumed_run_ends_as_an_uninterrupted_one(mode, tmp_path):
    with FakeGPU():
        whole = trained(tmp_path / "whole", *MODES[mode])
        trained(tmp_path / "parts", *MODES[mode], "SOLVER.EPOCHS", 1)
        resumed = trained(tmp_path / "parts", *MODES[mode], resume=True)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
