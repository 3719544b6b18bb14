"""The names of runs."""

import pytest

from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.run_name import experiment_name

CONFIG = "configs/digits/vanilla.yaml"


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "digits/vanilla,resnet8"),
        (["SOLVER.LR", "0.1"], "digits/vanilla,resnet8SOLVER.LR:0.1"),
        (["SOLVER.LR", "0.1", "EXPERIMENT.SEED", "3"], "digits/vanilla,resnet8SOLVER.LR:0.1,EXPERIMENT.SEED:3"),
        (["EXPERIMENT.NAME", "mine"], "digits/mine"),
        (["EXPERIMENT.PROJECT", "a/b", "EXPERIMENT.NAME", "../x y"], "a_b/__x_y"),
        (["LOG.WANDB", "False", "LOG.PREFIX", "/tmp", "DATASET.ROOT", "/data"], "digits/vanilla,resnet8"),
        (["DATASET.NUM_WORKERS", "0", "EXPERIMENT.DEVICE", "cpu"], "digits/vanilla,resnet8"),
        (
            ["DISTILLER.TEACHER_CACHE", "c", "DISTILLER.TEACHER_CACHE_GIB", "1"],
            "digits/vanilla,resnet8DISTILLER.TEACHER_CACHE_DTYPE:fp16",
        ),
        (
            ["DISTILLER.TEACHER_CACHE", "c", "DISTILLER.TEACHER_CACHE_DTYPE", "fp32", "SOLVER.LR", "1"],
            "digits/vanilla,resnet8DISTILLER.TEACHER_CACHE_DTYPE:fp32,SOLVER.LR:1",
        ),
        (["DISTILLER.TEACHER_CACHE_DEVICE", "host"], "digits/vanilla,resnet8"),
        (
            ["DISTILLER.TEACHER_CACHE_DEVICE", "device"],
            "digits/vanilla,resnet8DISTILLER.TEACHER_CACHE_DTYPE:fp16",
        ),
        (["DISTILLER.TEACHER_CKPT", "a/b"], "digits/vanilla,resnet8DISTILLER.TEACHER_CKPT:a_b"),
    ],
)
def test_settings_that_change_the_result_enter_the_name_of_a_run_and_machine_settings_do_not(overrides, name):
    assert experiment_name(load_cfg(CONFIG, overrides), overrides) == name


def test_a_name_too_long_for_a_folder_is_cut_and_stays_unique(tmp_path):
    names = []
    for end in ("a", "b"):
        overrides = ["EXPERIMENT.NAME", "é" * 200 + end]
        names.append(experiment_name(load_cfg(CONFIG, overrides), overrides).split("/")[1])
    assert names[0] != names[1]
    for name in names:
        (tmp_path / name).mkdir()
