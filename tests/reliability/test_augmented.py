"""Augmented, mixed, erased and smoothed runs of tools/train.py: killed and resumed, by workers, over two ranks."""

import signal
from functools import partial

import pytest
import torch

from .combinations import BASE, TOOL
from .runs import Run, differences

EVERYTHING = {
    "DISTILLER.TYPE": "KD", "DISTILLER.STUDENT": "dropout", "SOLVER.BATCH_SIZE": "16", "DATASET.MIXUP": "0.4",
    "DATASET.CUTMIX": "1.0", "DATASET.ERASING": "0.3", "SOLVER.LABEL_SMOOTHING": "0.1",
}  # fmt: skip
STEPS = 5  # of an epoch


def run_of(zygote, folder, name, settings, processes=1):
    launch = zygote.launch if processes == 1 else zygote.launch_pair
    return Run(folder / name, BASE | EVERYTHING | settings, partial(launch, tool=TOOL))


def weights(run):
    """Of the student after the last epoch."""
    return torch.load(run.log_path / "student_latest", weights_only=True)["model"]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", ["randaugment", "resized_crop"])
@pytest.mark.parametrize("data", ["small_images", "small_files"])
def test_a_killed_run_ends_like_one_never_killed_with_any_number_of_workers(folder, zygote, data, name, processes):
    settings = {"DATASET.TYPE": data, "DATASET.AUGMENT": name}
    of = partial(run_of, zygote, folder, processes=processes)
    whole, killed = (of(f"{data}{name}{processes}{word}", settings) for word in ("whole", "killed"))
    whole.finish()
    for step in (2, STEPS):  # within the first epoch, and, five steps after its resumption, within the second
        killed.environment = {"STOP": f"{step} {int(signal.SIGTERM)}"}
        assert killed.start().wait() == 128 + signal.SIGTERM, killed.output.read_text()[-2000:]
    killed.environment = {}
    killed.finish()
    assert differences(whole.log_path, killed.log_path) == []
    if data == "small_files":
        by_workers = of(f"{name}{processes}workers", settings | {"DATASET.NUM_WORKERS": "2"})
        by_workers.finish()
        assert same(weights(by_workers), weights(whole))
