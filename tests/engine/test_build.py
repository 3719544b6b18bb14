"""Building a trainer."""

import pytest
import torch

from mdistiller.distillers import RunFacts
from mdistiller.engine.build import build_distiller, build_trainer, deployment_lines
from mdistiller.engine.cfg import load_cfg
from mdistiller.errors import UserError
from mdistiller.models import cifar_model_dict

from .._networks import write_untrained

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


class Mine(torch.nn.Module):
    """A user's network for images of `size`, whose logits are `bare` and have `num_classes`, or `width`."""

    def __init__(self, num_classes, size=32, width=None, bare=False):
        super().__init__()
        self.fc, self.bare = torch.nn.Linear(3 * size**2, width or num_classes), bare

    def forward(self, image):
        logits = self.fc(image.flatten(1))
        return logits if self.bare else (logits, {})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bare": True}, r"the (student|teacher) Mine returns a tensor \(2, 10\)"),
        ({"width": 1000}, "the (student|teacher) mine returns logits of 1000 classes, but the data set has 10"),
        ({"size": 64}, r"(student|teacher) Mine does not take images \(B, 3, 32, 32\).*; it takes 64x64"),
    ],
)
@pytest.mark.parametrize("role", ["STUDENT", "TEACHER"])
def test_a_users_network_that_does_not_fit_the_data_set(role, options, message, tmp_path, monkeypatch):
    monkeypatch.setitem(cifar_model_dict, "mine", (lambda num_classes: Mine(num_classes, **options), None))
    torch.save({"model": Mine(10, **options).state_dict()}, tmp_path / "mine")
    names = ["DISTILLER.STUDENT", "resnet8", "DISTILLER.TEACHER", "resnet8", f"DISTILLER.{role}", "mine"]
    names += ["DISTILLER.TEACHER_CKPT", str(tmp_path / ("mine" if role == "TEACHER" else "resnet8"))]
    write_untrained(tmp_path / "resnet8", "resnet8", seed=0)
    quiet = ["LOG.PREFIX", str(tmp_path), "LOG.WANDB", "False", "EXPERIMENT.DEVICE", "cpu"]
    with pytest.raises(UserError, match=message):
        build_trainer(load_cfg("configs/digits/kd.yaml", [*names, *quiet])).train()


def test_a_users_teacher_without_a_checkpoint(monkeypatch):
    monkeypatch.setitem(cifar_model_dict, "mine", Mine)
    overrides = ["DISTILLER.TEACHER", "mine", "DISTILLER.TEACHER_CKPT", ""]
    cfg = load_cfg("configs/digits/kd.yaml", overrides)
    with pytest.raises(UserError, match=r"mine has no published checkpoint; set DISTILLER\.TEACHER_CKPT"):
        build_distiller(cfg, RunFacts.of(cfg))
