"""The teacher's outputs in the device's memory: the same runs as from the files, alone, with modes, over ranks."""

import contextlib
import csv
import io
import signal
from functools import partial

import pytest
import torch

from mdistiller.engine.runtime.signals import Stopped

from . import alone
from .combinations import launcher_of, run_of
from .runs import differences
from .train_small import in_step

WHERE = "DISTILLER.TEACHER_CACHE_DEVICE"


def untouched(trainer):
    """Nothing is done to it."""


def trained(folder, name, method, settings, resume=False, prepare=untouched):
    """The folder of a run, trained quietly."""
    with alone.within(folder / name), contextlib.redirect_stdout(io.StringIO()):
        trainer = alone.trainer_of(method, settings)
        prepare(trainer)
        trainer.train(resume=resume)
        return trainer.log_path.resolve()


def without_settings(found):
    """The differences of two runs, but for their configurations, and the former `latest` of one that was resumed."""
    return [name for name in found if name not in ("config.yaml", "latest_previous")]


def hits(path):
    """The percentage of rows that a run's cache had, for each epoch."""
    with (path / "metrics.csv").open(newline="") as file:
        return [float(row["teacher_cache_hits"]) for row in csv.DictReader(file)]


def spoil_second_step(trainer):
    """The second step's loss is NaN."""
    forward, calls = trainer.distiller.forward_train, []

    def forward_train(**batch):
        logits, losses = forward(**batch)
        calls.append(1)
        return logits, losses if len(calls) != 2 else {**losses, "loss_kd": losses["loss_kd"] * torch.nan}

    trainer.distiller.forward_train = forward_train


# Method, settings, what is done to the trainer.
RUNS = {
    "KD": ("KD", {}, untouched),
    "CRD": ("CRD", {}, untouched),
    "micro-batches": ("DKD", {"SOLVER.ACCUMULATE": 3}, untouched),
    "DOT": ("KD", {"SOLVER.TRAINER": "dot"}, untouched),
    "bf16": ("KD", {"SOLVER.AMP": "bf16", "SOLVER.EMA": 0.9}, untouched),
    "a skipped step": ("KD", {"SOLVER.NAN_POLICY": "skip"}, spoil_second_step),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_gets_the_same_bits_from_memory_as_from_the_files(name, folder, registered):
    method, settings, prepare = RUNS[name]
    settings = {**settings, "DISTILLER.TEACHER_CACHE": folder / f"{name} cache", "SOLVER.EPOCHS": 2}
    paths = [
        trained(folder, f"{name} {place}", method, settings | {WHERE: place}, prepare=prepare)
        for place in ("host", "device")
    ]
    assert without_settings(differences(*paths)) == []
    assert hits(paths[0])[0] < 100 and hits(paths[1]) == [100.0, 100.0]


def test_a_run_without_files_is_resumed_within_its_third_epoch_bit_for_bit(folder, registered):
    """Of the resumed process, no row is known; of the other, those of two epochs."""
    settings = {WHERE: "device", "SOLVER.EPOCHS": 3, "DISTILLER.TEACHER_CACHE_DTYPE": "fp32"}
    whole = trained(folder, "whole", "KD", settings)
    with pytest.raises(Stopped):
        trained(folder, "stopped", "KD", settings, prepare=partial(stops, step=8))
    stopped = trained(folder, "stopped", "KD", settings, resume=True)
    assert without_settings(differences(whole, stopped)) == []


def stops(trainer, step):
    """Let a SIGTERM arrive in this step."""
    train = trainer.run

    def run(first):
        with in_step(step, partial(setattr, trainer.stop, "signal", signal.SIGTERM)):
            train(first)

    trainer.run = run


def test_two_ranks_get_the_same_bits_from_memory_as_from_the_files(folder, zygote):
    """Each computes the rows of its own images and writes them; then both read them, also those of the other."""
    case = {"method": "KD", "student": "small", "data": "small_images", "several ranks": "several ranks"}
    paths = {}
    for name, place in (("fills", "device"), ("reads", "device"), ("from files", "host")):
        run = run_of(case, folder / f"ranks {name}", launcher_of(case, zygote))
        run.settings |= {"DISTILLER.TEACHER_CACHE": str(folder / "ranks cache"), WHERE: place}
        run.finish()
        paths[name] = run.log_path
    assert differences(paths["fills"], paths["reads"]) == []
    assert without_settings(differences(paths["fills"], paths["from files"])) == []
    assert hits(paths["fills"])[0] == 0 and hits(paths["reads"]) == hits(paths["from files"]) == [100.0, 100.0]
