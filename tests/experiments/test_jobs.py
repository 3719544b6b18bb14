"""Jobs: when one is done, and the process that trains it."""

from pathlib import Path

import pytest

from mdistiller.errors import UserError
from mdistiller.experiments.jobs import finished_run, make_job, task

CONFIG = Path("configs/digits/kd.yaml")


def job_of(tmp_path, name="a", **overrides):
    place = {"LOG.PREFIX": tmp_path, "EXPERIMENT.NAME": name, "EXPERIMENT.PROJECT": "p"}
    return make_job(name, CONFIG, {**place, **{k.replace("__", "."): v for k, v in overrides.items()}})


def test_a_job_is_done_when_its_last_epoch_is(make_run, tmp_path):
    job = job_of(tmp_path)
    assert finished_run(job) is None
    make_run("", [{"test_acc": 1}] * 11, folder=job.folder)
    assert finished_run(job) is None
    with (job.folder / "metrics.csv").open("a") as file:
        file.write("12,50\n")
    assert finished_run(job).last == 50


def test_a_run_with_another_configuration_is_refused(make_run, tmp_path):
    job = job_of(tmp_path)
    make_run("", [{"test_acc": 1}] * 12, "KD.TEMPERATURE", "9", "LOG.WANDB", "False", folder=job.folder)
    with pytest.raises(UserError, match=r"holds a run with KD.TEMPERATURE 9 where the plan says 4; move it away"):
        finished_run(job)


@pytest.mark.parametrize("name", ["latest", "best"])
def test_a_job_with_a_checkpoint_is_resumed(tmp_path, name):
    job = job_of(tmp_path)
    command = task(job).command
    assert command[1:6] == ["-m", "mdistiller", "train", "--cfg", str(CONFIG)]
    assert command[6:8] == ["LOG.PREFIX", str(tmp_path)]
    job.folder.mkdir(parents=True)
    (job.folder / name).touch()
    assert task(job).command[6] == "--resume"


def test_a_run_that_differs_only_in_machine_settings_counts_as_finished(make_run, tmp_path):
    """Data folder, device, number of workers and teacher cache do not change the result."""
    job = job_of(tmp_path, DISTILLER__TEACHER_CACHE=tmp_path / "cache", DISTILLER__TEACHER_CACHE_GIB=2)
    elsewhere = ["DATASET.ROOT", "/data", "EXPERIMENT.DEVICE", "cuda:1", "DATASET.NUM_WORKERS", "7"]
    make_run("", [{"test_acc": 1}] * 12, *elsewhere, folder=job.folder)
    assert finished_run(job).last == 1


def test_what_the_data_told_a_run_is_no_other_configuration(make_run, tmp_path):
    """config.yaml holds the classes and the images' size and normalisation, which the plan leaves to the data."""
    told = ["DATASET.TYPE", "folder", "DATASET.NUM_CLASSES", "20", "DATASET.IMAGE_SIZE", "64",
            "DATASET.MEAN", "[0.5, 0.5, 0.5]", "DATASET.STD", "[0.5, 0.5, 0.5]"]  # fmt: skip
    job = job_of(tmp_path, DATASET__TYPE="folder", DATASET__IMAGE_SIZE=64)
    make_run("", [{"test_acc": 1}] * 12, *told, folder=job.folder)
    assert finished_run(job).last == 1
    other = job_of(tmp_path, DATASET__TYPE="folder", DATASET__IMAGE_SIZE=96)
    make_run("", [{"test_acc": 1}] * 12, *told, folder=other.folder)
    with pytest.raises(UserError, match=r"holds a run with DATASET.IMAGE_SIZE 64 where the plan says 96"):
        finished_run(other)
