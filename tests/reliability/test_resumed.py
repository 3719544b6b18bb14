"""Runs of a student with dropout, stopped at chosen moments and resumed, against a run that was never stopped."""

import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from .runs import STEPS, Run, differences

TOOL = Path(__file__).with_name("train_dropout.py")
DROPOUT = {
    "DISTILLER.TYPE": "KD", "DISTILLER.STUDENT": "dropout_net", "SOLVER.EMA": "0.9", "SOLVER.NAN_POLICY": "skip",
    "SOLVER.EPOCHS": "2", "SOLVER.LR_DECAY_STAGES": "[1]", "LOG.SAVE_CHECKPOINT_ITERS": "0",
}  # fmt: skip


def launcher(zygote, processes):
    return partial(zygote.launch if processes == 1 else zygote.launch_pair, tool=TOOL)


def saved(run):
    """Number of epochs done, and of steps in the next one, according to `latest`."""
    latest = torch.load(run.log_path / "latest", weights_only=True)
    return latest["epoch"], latest.get("within_epoch", {}).get("step", 0)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_stopped_in_training_and_in_validation_ends_like_one_never_stopped(tmp_path, zygote, processes):
    """Killed within validation, the run goes on with validation. Two ranks agree on a signal with their next step."""
    late = processes - 1
    whole, stopped = (Run(tmp_path / name, DROPOUT, launcher(zygote, processes)) for name in ("whole", "stopped"))
    whole.finish()
    for moment, number, at in (
        ("train 4", signal.SIGTERM, (0, 4 + late)),
        (f"validate {STEPS - 4 - late}", signal.SIGKILL, (0, STEPS)),
        ("validate 0", signal.SIGTERM, (0, STEPS) if processes == 1 else (1, 0)),  # of one batch
        ("train 5", signal.SIGKILL, (1, 0)),
        ("train 5", signal.SIGTERM, (1, 5 + late)),
    ):
        stopped.environment = {"SIGNAL_AT": f"{moment} {number.value}"}
        assert stopped.start().wait() in (-number, 128 + number), stopped.output.read_text()[-2000:]
        assert saved(stopped) == at, moment
    stopped.environment = {}
    stopped.finish()
    assert differences(whole.log_path, stopped.log_path) == []


def test_every_image_is_seen_once_in_an_epoch_that_other_processes_finish(tmp_path, zygote):
    seen = {"DISTILLER.TYPE": "SEEN", "SOLVER.EPOCHS": "1", "SOLVER.EMA": "0"}
    run = Run(tmp_path, DROPOUT | seen, launcher(zygote, 2), {"SIGNAL_AT": f"train 4 {signal.SIGTERM.value}"})
    assert run.start().wait() == 128 + signal.SIGTERM
    run.environment, run.launcher = {}, launcher(zygote, 1)
    run.finish()
    (said,) = [line for line in run.output.read_text().splitlines() if line.startswith("note: resuming")]
    assert said.endswith("with the number of processes 1 (was 2)")
    steps = [line.split() for path in tmp_path.glob("seen.*") for line in path.read_text().splitlines()]
    images = [index for step in steps for index in step]
    assert len(steps) == 2 * 5 + STEPS - 5 and len(images) == len(set(images)) > 16 * (STEPS - 1)
