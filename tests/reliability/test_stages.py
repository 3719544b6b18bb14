"""Runs with stages before training, stopped within them and resumed: they end as undisturbed ones, bit for bit."""

import csv
import signal
from functools import partial

import pytest
import torch

from .combinations import BASE, TOOL
from .runs import Run, differences
from .small import write_data

STEPS = 5  # an epoch; a stage has two
KILL, TERM = signal.SIGKILL, signal.SIGTERM
# Settings, the step in which the run is stopped, the signal, the number of processes.
CASES = {
    "FT, killed": ({"DISTILLER.TYPE": "FT", "SOLVER.EMA": "0.9"}, 7, KILL, 1),
    "AB, told to stop": ({"DISTILLER.TYPE": "AB", "SOLVER.WARMUP_EPOCHS": "1"}, 3, TERM, 1),
    "FSP, told to stop, of two ranks": ({"DISTILLER.TYPE": "FSP"}, 7, TERM, 2),
    "FITNET, in training": ({"DISTILLER.TYPE": "FITNET"}, 13, KILL, 1),
    "FT, in the last step of the stage": ({"DISTILLER.TYPE": "FT"}, 10, TERM, 1),
    "FT, in the first step of training": ({"DISTILLER.TYPE": "FT", "SOLVER.EMA": "0.9"}, 11, KILL, 1),
    "FT by DOT, of two ranks": ({"DISTILLER.TYPE": "FT", "SOLVER.TRAINER": "dot"}, 6, KILL, 2),
    "DCGD of FITNET": ({"DISTILLER.TYPE": "DCGD", "DCGD.BASE": "FITNET"}, 7, KILL, 1),
    "AB in every mode": (
        {
            "DISTILLER.TYPE": "AB", "SOLVER.AMP": "bf16", "SOLVER.ACCUMULATE": "3", "SOLVER.CLIP_GRAD_NORM": "1.0",
            "SOLVER.NAN_POLICY": "skip", "SOLVER.EMA": "0.9", "SOLVER.TYPE": "AdamW", "SOLVER.LR": "0.001",
        }, 8, KILL, 1,
    ),
    "FT in fp16": ({"DISTILLER.TYPE": "FT", "SOLVER.AMP": "fp16"}, 8, TERM, 1),
}  # fmt: skip
QUICK = ("FT, killed", "AB, told to stop", "FSP, told to stop, of two ranks", "FT, in the last step of the stage")
COMPILED = {"DISTILLER.TYPE": "FT", "SOLVER.COMPILE": "True"}
COMMON = {
    "DISTILLER.STUDENT": "small", "DATASET.TYPE": "small_images", "SOLVER.BATCH_SIZE": "16", "SOLVER.LR": "0.01",
    "LOG.SAVE_CHECKPOINT_ITERS": "2", **{f"{method}.INIT_EPOCHS": "2" for method in ("AB", "FITNET", "FSP", "FT")},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("stages")
    write_data(found / "data")
    return found


def run_of(settings, folder, zygote, ranks=1, stop=""):
    launcher = partial(zygote.launch if ranks == 1 else zygote.launch_pair, tool=TOOL)
    return Run(folder, BASE | COMMON | settings, launcher, {"STOP": stop} if stop else {})


def stopped_and_whole(name, settings, step, sent, ranks, folder, zygote):
    """The folders of a run that was stopped in `step` and resumed, and of one that was not."""
    whole = run_of(settings, folder / f"{name}, whole", zygote, ranks)
    whole.finish()
    stopped = run_of(settings, folder / f"{name}, stopped", zygote, ranks, stop=f"{step} {int(sent)}")
    status = stopped.start().wait()
    said = stopped.output.read_text()
    assert status in ((143,) if sent == TERM else (-9, 1)) and "Best accuracy" not in said, said[-3000:]
    stopped.environment = {}
    stopped.finish()
    return stopped, whole


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES])
def test_a_run_that_is_stopped_within_a_stage_ends_the_same(name, folder, zygote):
    stopped, whole = stopped_and_whole(name, *CASES[name], folder, zygote)
    assert differences(whole.log_path, stopped.log_path) == []
    with (whole.log_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["-1", "0", "1", "2"]
    assert [bool(row["test_acc"]) for row in rows] == [False, False, True, True]
    assert [bool(row["train_acc"]) for row in rows] == [False, False, True, True]
    assert torch.load(whole.log_path / "latest", weights_only=True)["epoch"] == 2


@pytest.mark.slow
def test_a_compiled_stage_too(folder, zygote):
    stopped, whole = stopped_and_whole("compiled", COMPILED, 7, KILL, 1, folder, zygote)
    assert differences(whole.log_path, stopped.log_path) == []


def test_the_log_names_the_stage(folder, zygote):
    run = run_of({"DISTILLER.TYPE": "FT"}, folder / "said", zygote, stop=f"7 {int(TERM)}")
    assert run.start().wait() == 143
    run.environment = {}
    run.finish()
    said = run.output.read_text()
    lines = [line.split(",")[:2] for line in said.splitlines() if line.startswith(("paraphraser", "epoch "))]
    assert lines == [
        ["paraphraser", " epoch 1/2: lr 0.01"], ["paraphraser", " epoch 2/2: lr 0.01"],
        ["epoch 1/2: lr 0.01", lines[2][1]], ["epoch 2/2: lr 0.001", lines[3][1]],
    ]  # fmt: skip
