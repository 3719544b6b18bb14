"""Building a trainer."""


from mdistiller.engine.build import build_trainer, deployment_lines
from mdistiller.engine.cfg import load_cfg

CONFIG = "configs/digits/vanilla.yaml"


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
