"""SIMKD's and NORM's runs: one network is scored, saved, averaged, costed, resumed, exported and, for NORM, merged."""

import re

import pytest
import torch

from mdistiller.commands.convert import convert
from mdistiller.commands.eval import evaluate_checkpoint
from mdistiller.engine.build import build_trainer, deployment_lines
from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.files.checkpoint import load_checkpoint
from mdistiller.errors import UserError
from mdistiller.experiments.method_cost import method_costs

from .._networks import write_untrained

# Of resnet8 -> resnet14 with ten classes: 78,042 parameters of the student, 650 of them of its classifier, which SIMKD
# replaces by another of as many; its projector, and NORM's layers for N = 2.
PROJECTOR = 2 * 64 * 32 + 9 * 32**2 + 2 * (32 + 32 + 64)
LAYERS = 2 * 64 * 128 + 2 * (128 + 64)
METHODS = {"SIMKD": ("simkd", "SimKDNetwork", 78_042 + PROJECTOR), "NORM": ("norm", "NormNetwork", 78_042 + LAYERS)}


@pytest.fixture(scope="module", params=METHODS)
def trained(request, tmp_path_factory):
    """A short run with an EMA."""
    folder = tmp_path_factory.mktemp(request.param)
    overrides = {
        "DISTILLER.TYPE": request.param, "DISTILLER.TEACHER": "resnet14", "NORM.N": 2, "SOLVER.BATCH_SIZE": 32,
        "DISTILLER.TEACHER_CKPT": write_untrained(folder / "teacher", "resnet14", 1), "DATASET.TRAIN_FRACTION": 0.1,
        "SOLVER.EPOCHS": 2, "SOLVER.EMA": 0.9, "LOG.PREFIX": folder, "LOG.WANDB": False, "EXPERIMENT.DEVICE": "cpu",
        "EXPERIMENT.NAME": "run",
    }  # fmt: skip
    cfg = load_cfg("configs/digits/vanilla.yaml", [str(x) for pair in overrides.items() for x in pair])
    trainer = build_trainer(cfg)
    trainer.train()
    return trainer, cfg, request.param


def top1(path):
    text = evaluate_checkpoint(None, str(path), None, 64, device="cpu")
    return [float(value) for value in re.findall(r"top-1 ([\d.]+)", text)]


def test_one_network_is_scored_saved_averaged_costed_and_named(trained, tmp_path):
    trainer, cfg, method = trained
    name, kind, parameters = METHODS[method]
    folder, last = trainer.log_path, trainer.state.last_acc
    (deployed,) = trainer.distiller.deployments().values()
    saved = load_checkpoint(folder / "student_latest")
    assert saved["deployed"] == kind and all(v.equal(saved["model"][k]) for k, v in deployed.state_dict().items())
    for file, head in (("student_latest", "student"), ("latest", "student"), ("student_latest_ema", "ema")):
        assert top1(folder / file) == [pytest.approx(last[head], abs=0.005)], file
    assert top1(folder / "student_best") == [pytest.approx(trainer.state.best_acc["student"], abs=0.005)]
    assert method_costs(cfg)[0][name].parameters == parameters
    assert deployment_lines(trainer)[0].startswith(f"{name}: {parameters / 1e6:.2f} M parameters")

    (tmp_path / "config.yaml").write_text((folder / "config.yaml").read_text())
    for out in ("out.safetensors", "out.pth"):
        convert(folder / "student_latest", tmp_path / out)
        assert load_checkpoint(tmp_path / out)["deployed"] == kind
        assert top1(tmp_path / out) == [pytest.approx(last["student"], abs=0.005)]


def test_the_student_alone_is_not_what_the_file_holds(trained):
    folder, kind = trained[0].log_path, METHODS[trained[2]][1]
    with pytest.raises(UserError, match=rf"does not fit ResNet.*; it holds the {kind} .* without -m scores"):
        evaluate_checkpoint("resnet8", str(folder / "student_best"), "digits", 64, device="cpu")


def test_the_run_resumes(trained):
    trainer, cfg, _ = trained
    longer = cfg.clone()
    longer.defrost()
    longer.SOLVER.EPOCHS = 3
    again = build_trainer(longer)
    again.log_path = again.state.folder = trainer.log_path
    assert again.begin(resume=True) == 3
    own, average = trainer.distiller.state_dict(), trainer.ema.network.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in again.distiller.state_dict().items())
    assert all(torch.equal(v, average[k]) for k, v in again.ema.network.state_dict().items())


def test_a_merged_file_scores_the_same(trained, capsys):
    trainer, _, method = trained
    folder = trainer.log_path
    if method == "SIMKD":
        with pytest.raises(
            UserError, match="no layers that can be merged: SimKD deploys a SimKDNetwork as it is; leave"
        ):
            convert(folder / "student_best", folder / "never", merge=True)
        return
    for file in ("student_best", "student_latest_ema", "latest"):
        for merged in (folder / f"merged_{file}", folder / f"merged_{file}.safetensors"):
            convert(folder / file, merged, merge=True)
            content = load_checkpoint(merged)
            assert content["deployed"] == "MergedNormNetwork"
            assert content["model"]["merged.weight"].shape == (64, 64, 1, 1)
            assert top1(merged) == top1(folder / file)
            assert content["input"] == load_checkpoint(folder / file)["input"]
    said = evaluate_checkpoint(None, str(merged), None, 64, device="cpu")
    assert f"norm: {(78_042 + 64 * 65) / 1e6:.2f} M parameters" in said  # one convolution for the two
    with pytest.raises(UserError, match="MergedNormNetwork as it is; leave out --merge"):
        convert(merged, folder / "never", merge=True)
    with pytest.raises(UserError, match="leave out --key student"):
        convert(merged, folder / "never", key="student", merge=True)
