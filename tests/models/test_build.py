"""The registries: every network builds, runs and learns; names, similar names, and the paths of teachers' files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mdistiller.errors import UnknownNameError, UserError
from mdistiller.models import build as build_module
from mdistiller.models import (
    build_model,
    cifar_model_dict,
    imagenet_model_dict,
    teacher_checkpoint,
    tiny_imagenet_model_dict,
)

from .. import _golden as golden

MODELS = {
    "cifar100": cifar_model_dict,
    "tiny_imagenet": tiny_imagenet_model_dict,
    "imagenet": imagenet_model_dict,
}
# ImageNet's networks are run on small images too: pooling is global.
IMAGE_SIZE = {"cifar100": 32, "tiny_imagenet": 64, "imagenet": 64}
PLAIN = [(dataset, name) for dataset, models in MODELS.items() for name in models if "_M_" not in name]


@pytest.mark.parametrize(("dataset", "name"), PLAIN)
def test_builds_runs_and_learns(dataset: str, name: str) -> None:
    torch.manual_seed(0)
    model = build_model(MODELS[dataset], name, num_classes=7)
    size = IMAGE_SIZE[dataset]
    logits, features = model(torch.randn(2, 3, size, size))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    assert features["pooled_feat"].ndim == 2
    assert [f.shape for f in features["preact_feats"]] == [f.shape for f in features["feats"]]
    # Stages are counted from the last: some networks leave out the stem.
    channels = model.get_stage_channels()
    assert channels == [f.shape[1] for f in features["feats"]][-len(channels) :]
    # OFD's margins: one scale and shift a channel, of the last stages.
    norms = model.get_bn_before_relu()
    assert [len(bn.weight) for bn in norms] == channels[-len(norms) :]
    assert len(model.get_feat_modules()) > 0

    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_golden_rows_are_registered() -> None:
    for row in golden.load("models"):
        assert row["model"] in MODELS[row["dataset"]]


def test_names() -> None:
    cifar = """resnet8 resnet14 resnet20 resnet32 resnet44 resnet56 resnet110 resnet8x4 resnet32x4 ResNet18 ResNet50
        wrn_16_1 wrn_16_2 wrn_40_1 wrn_40_2 vgg8 vgg11 vgg13 vgg16 vgg19 MobileNetV2 ShuffleV1 ShuffleV2"""
    assert set(cifar.split()) <= set(cifar_model_dict)
    assert {"ResNet18", "MobileNetV2", "ShuffleV2"} <= set(tiny_imagenet_model_dict)
    assert {"ResNet18", "ResNet34", "ResNet50", "ResNet101", "ResNet152", "MobileNetV1"} <= set(imagenet_model_dict)


def test_unknown_name_lists_a_similar_one() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown CIFAR model 'resnet65'; did you mean resnet56"):
        build_model(cifar_model_dict, "resnet65", 100)


def test_published_teachers() -> None:
    published = {name: entry[1] for name, entry in cifar_model_dict.items() if entry[1]}
    assert set(published) == {"resnet56", "resnet110", "resnet32x4", "ResNet50", "wrn_40_2", "vgg13"}
    for name, path in published.items():
        assert Path(path).parts[-4:] == ("download_ckpts", "cifar_teachers", f"{name}_vanilla", "ckpt_epoch_240.pth")
    tiny = Path(tiny_imagenet_model_dict["ResNet18"][1])
    assert tiny.parts[-4:] == ("download_ckpts", "tiny_imagenet_teachers", "ResNet18_vanilla", "ti_res18")


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """An empty current folder and an empty download_ckpts/ of the repository."""
    here, repository = tmp_path / "here", tmp_path / "repository" / "download_ckpts"
    here.mkdir()
    repository.mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setattr(build_module, "REPOSITORY_FOLDER", repository)
    return here, repository


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_default_is_looked_for_in_the_current_folder_first(folders: tuple[Path, Path]) -> None:
    here, repository = folders
    default = build_module.default_checkpoint("cifar_teachers/t/c.pth")
    with pytest.raises(UserError) as error:
        teacher_checkpoint(default, "resnet56")
    message = str(error.value)
    assert str(here / "download_ckpts/cifar_teachers/t/c.pth") in message
    assert str(repository / "cifar_teachers/t/c.pth") in message
    assert "resnet56" in message
    assert "DISTILLER.TEACHER_CKPT" in message
    assert "\n" not in message

    in_repository = put(repository / "cifar_teachers/t/c.pth")
    assert teacher_checkpoint(default) == in_repository
    in_here = put(here / "download_ckpts/cifar_teachers/t/c.pth")
    assert teacher_checkpoint(default) == in_here


def test_a_users_path_is_tried_unchanged_first(folders: tuple[Path, Path]) -> None:
    here, repository = folders
    in_repository = put(repository / "out/student_best")
    assert teacher_checkpoint("out/student_best") == in_repository
    put(here / "out/student_best")
    assert teacher_checkpoint("out/student_best") == Path("out/student_best")
    assert teacher_checkpoint(in_repository.resolve()) == in_repository


def test_an_absolute_path_is_the_only_one_tried(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"at \S+/nowhere\.pth; put it there"):
        teacher_checkpoint(tmp_path / "nowhere.pth")


@pytest.mark.parametrize("missing", [None, ""])
def test_no_published_teacher(missing: str | None) -> None:
    with pytest.raises(UserError, match=r"resnet20 has no published checkpoint; .*DISTILLER\.TEACHER_CKPT"):
        teacher_checkpoint(missing, "resnet20")
