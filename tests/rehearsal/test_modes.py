"""Every mode of the engine on the fake GPU: where the host waits in its steps, and in a whole run."""

import ast
import sys
from collections import Counter

import pytest
import torch

from mdistiller.engine import modes, nan_watch, progress_bar
from mdistiller.engine.teacher import cache

from ._fake_gpu import ROOT, FakeGPU
from ._runs import run_waits, step_waits, trainer_for
from .places import EPOCH, START, STEP

# A mode -> its settings. Those of `engine.modes` are taken from there.
ELSEWHERE = {"compiled", "several ranks", "BatchNorm over all ranks", "loader workers", "broken images skipped"}
SETTINGS = {
    mode.name: [word for pair in mode.settings.items() for word in pair]
    for mode in modes.MODES
    if mode.name not in ELSEWHERE
} | {
    "plain": [],
    "fp16, micro-batches, clipping, EMA": [
        *("SOLVER.AMP", "fp16", "SOLVER.ACCUMULATE", 3, "SOLVER.CLIP_GRAD_NORM", 1.0, "SOLVER.EMA", 0.9)
    ],
    "teacher cache in files": ["DISTILLER.TEACHER_CACHE", "cache", "DISTILLER.TEACHER_CACHE_DEVICE", "host"],
    "losses read": [],
    "steps logged": ["LOG.TENSORBOARD_FREQ", 1],
    "progress bar": [],
    "teacher scored": ["DISTILLER.SCORE_TEACHER", True],
}
METHOD = {"chosen pairs of maps": "AT"}
# Those that change the step most.
OF_STEPS = (
    "DOT", "DeepKD", "aligned gradients", "steps skipped at NaN", "fp16, micro-batches, clipping, EMA",
    "teacher cache in memory", "teacher cache in files",
)  # fmt: skip


def named(mode):
    return set(STEP.get("fp16" if mode.startswith("fp16") else mode, ()))


def trainer_in(mode, folder, monkeypatch, *overrides):
    monkeypatch.chdir(folder)  # where the cache is
    monkeypatch.setattr(cache, "_free", lambda device: 2**40)  # a driver would tell
    if mode == "losses read":
        monkeypatch.setattr(nan_watch, "_EVERY", 2)
    if mode == "progress bar":
        monkeypatch.setattr(progress_bar, "_REFRESH", 0)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    return trainer_for(
        folder, METHOD.get(mode, "KD"), "resnet8", "resnet8",
        *("LOG.TENSORBOARD_FREQ", 1000, *SETTINGS[mode], *overrides),
    )  # fmt: skip


@pytest.mark.parametrize("mode", OF_STEPS)
def test_no_step_waits_but_in_the_named_places(mode, tmp_path, monkeypatch):
    with FakeGPU() as gpu:
        trainer = trainer_in(mode, tmp_path, monkeypatch)
        waits = step_waits(gpu, trainer)
    assert {wait.place for wait in waits} == named(mode), "\n".join(map(str, waits))


@pytest.mark.parametrize("mode", [pytest.param(m, marks=() if m == "plain" else pytest.mark.slow) for m in SETTINGS])
def test_a_whole_run_waits_in_the_named_places_alone(mode, tmp_path, monkeypatch, capsys):
    heads = 2 if "EMA" in mode else 1
    with FakeGPU() as gpu:
        waits = run_waits(gpu, trainer_in(mode, tmp_path, monkeypatch))
    assert {wait.place for wait in waits.start} <= set(START) | named(mode)
    assert {wait.place for wait in waits.steps} == named(mode), "\n".join(map(str, waits.steps))
    assert {wait.place for wait in waits.epochs} <= set(EPOCH) | named(mode)
    # Six batches of validation, which wait once for all.
    assert Counter(wait.function for wait in waits.epochs)["evaluate"] == 2 * heads


@pytest.mark.slow
def test_a_step_that_is_skipped_reads_the_loss_scale_too(tmp_path, monkeypatch):
    mode = "steps skipped at NaN"
    with FakeGPU() as gpu:
        trainer = trainer_in(mode, tmp_path, monkeypatch, "SOLVER.AMP", "fp16", "SOLVER.EMA", 0.9)
        assert step_waits(gpu, trainer)
        norm = trainer.update.norm
        monkeypatch.setattr(trainer.update, "norm", lambda: norm() * torch.nan)
        # Below a scale of 1, NaN is not the scale's fault.
        trainer.update.scaler._scale.fill_(0.5)
        waits = step_waits(gpu, trainer)
    assert trainer.nan_policy.skipped == 3
    assert {wait.place for wait in waits} == named(mode) | set(STEP["steps skipped in fp16"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["CRD", "DCGD_KD", "OFD"])
def test_a_whole_run_of_a_method_waits_in_the_named_places_alone(method, tmp_path):
    with FakeGPU() as gpu:
        waits = run_waits(gpu, trainer_for(tmp_path, method, "resnet14", "resnet8"))
    assert {wait.place for wait in waits.start} <= set(START)
    assert not waits.steps
    assert {wait.place for wait in waits.epochs} <= set(EPOCH)


def test_the_named_places_are_there():
    every = [*START, *EPOCH, *(place for places in STEP.values() for place in places)]
    for place in every:
        file, function = place.split(" ")
        tree = ast.parse((ROOT / file).read_text())
        assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, place
