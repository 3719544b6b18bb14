"""Building a trainer."""

import pytest
import torch

from mdistiller.distillers import RunFacts
from mdistiller.engine.build import build_distiller, build_trainer, deployment_lines
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


@pytest.mark.parametrize("method", ["FITNET", "VID", "AT", "REVIEWKD", "CRD"])
def test_a_method_knows_the_size_of_the_runs_images(method):
    """Tiny-ImageNet's 64x64; FITNET and VID failed by the original's default, INPUT_SIZE [32, 32]."""
    overrides = ["DATASET.TYPE", "tiny_imagenet", "DISTILLER.TYPE", method, "DISTILLER.TEACHER", "MobileNetV2"]
    cfg = load_cfg("configs/cifar100/kd.yaml", [*overrides, "DISTILLER.STUDENT", "ResNet18", "CRD.NCE.K", "4"])
    facts = RunFacts(8, 200, None, 64, 1, None, None)
    distiller = build_distiller(cfg, facts, trained=False).train()
    batch = {"image": torch.rand(2, 3, 64, 64), "target": torch.tensor([0, 1]), "index": torch.tensor([0, 1])}
    _, losses = distiller(**batch, contrastive_index=torch.randint(8, (2, 5)), epoch=1)
    assert all(loss.isfinite() for loss in losses.values())


def test_the_facts_of_a_run():
    trainer = build_trainer(load_cfg(CONFIG, ["DATASET.TRAIN_FRACTION", "0.1", "SOLVER.EPOCHS", "7"]))
    facts = RunFacts.of(trainer.cfg, trainer.train_loader)
    assert (facts.num_data, facts.num_classes, facts.image_size, facts.epochs) == (143, 10, 32, 7)
    assert facts.class_names == tuple("0123456789") and facts.mean == (0.3050,) * 3 and facts.std == (0.3234,) * 3
