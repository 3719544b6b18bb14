"""The names of runs, and building a trainer."""

import pytest

from mdistiller.engine.build import build_trainer, deployment_lines, experiment_name
from mdistiller.engine.cfg import load_cfg

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


def test_the_student_starts_from_the_same_weights_with_the_same_seed(tmp_path):
    common = ["LOG.PREFIX", str(tmp_path), "EXPERIMENT.DEVICE", "cpu", "DATASET.TRAIN_FRACTION", "0.1"]
    plain = build_trainer(load_cfg(CONFIG, common))
    other = build_trainer(load_cfg(CONFIG, [*common, "SOLVER.LR", "0.01"]))
    seeded = build_trainer(load_cfg(CONFIG, [*common, "EXPERIMENT.SEED", "1"]))
    weights = [t.distiller.student.state_dict()["conv1.weight"] for t in (plain, other, seeded)]
    assert weights[0].equal(weights[1]) and not weights[0].equal(weights[2])
    assert deployment_lines(plain) == ["student: 0.08 M parameters, 12.5 M MACs"]


def test_building_writes_nothing(tmp_path):
    build_trainer(load_cfg(CONFIG, ["LOG.PREFIX", str(tmp_path / "output"), "DATASET.TRAIN_FRACTION", "0.1"]))
    assert list(tmp_path.iterdir()) == []
