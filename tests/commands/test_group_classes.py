"""Groups from a teacher's errors, end to end on a few of the digits; cross-validation of its last layer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mdistiller.commands import group_classes as module
from mdistiller.commands.group_classes import group_classes
from mdistiller.dataset import dataset_info
from mdistiller.engine.files.checkpoint import save_checkpoint
from mdistiller.errors import UserError
from mdistiller.grouping import class_distances, count_confusions, group_by_confusion, load_distances, load_groups
from mdistiller.models import build_model, cifar_model_dict


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    """An untrained resnet8, which makes enough errors, and its checkpoint. Every split has 60 images."""
    torch.manual_seed(0)
    net = build_model(cifar_model_dict, "resnet8", 10)
    save_checkpoint({"model": net.state_dict()}, tmp_path / "teacher")
    data = dataset_info["digits"]
    few = torch.arange(60)
    whole = data.read
    object.__setattr__(data, "read", lambda root, train, skip_broken=False: whole(root, train).select(few))
    yield net.eval()
    object.__setattr__(data, "read", whole)


def run(tmp_path, **options):
    out = tmp_path / "made" / "groups.json"
    text = group_classes(
        **{"model": "resnet8", "ckpt": str(tmp_path / "teacher"), "dataset": "digits", "num_groups": 3, "out": out}
        | {"num_workers": 0, "device": "cpu"}
        | options
    )
    return text, json.loads(out.read_text()), out


def predictions(net, train=True, keep=None):
    split = dataset_info["digits"].read(None, train)
    split = split if keep is None else split.select(keep)
    image, target = next(iter(split.loader(60, 0, train=False)))
    with torch.no_grad():
        return target.numpy(), net(image)[0].argmax(1).numpy()


def test_files_hold_the_groups_and_how_they_were_made(tmp_path, teacher, capsys):
    text, content, out = run(tmp_path)
    confusion = count_confusions(*predictions(teacher), 10)
    assert content["confusion"] == confusion.tolist()
    assert content["groups"] == group_by_confusion(confusion, 3) == load_groups(str(out))
    assert (content["teacher"], content["split"], content["images"]) == ("resnet8", "train", 60)
    assert content["date"].startswith("20")
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert str(out) in text
    assert "too few" in capsys.readouterr().err


def test_test_images_are_used_only_on_request_and_with_a_warning(tmp_path, teacher, capsys):
    _, content, _ = run(tmp_path, split="test")
    assert content["confusion"] == count_confusions(*predictions(teacher, train=False), 10).tolist()
    assert "the test images leak the test set into training" in capsys.readouterr().err


def test_held_out_images_are_those_that_training_does_not_use(tmp_path, teacher, monkeypatch):
    _, content, _ = run(tmp_path, split="heldout", val_fraction=0.4)
    targets = dataset_info["digits"].read(None, True).targets
    _, held_out = module.stratified_split(targets, 0.6)
    assert content["confusion"] == count_confusions(*predictions(teacher, keep=held_out), 10).tolist()


def test_kfold_runs_on_the_pooled_features(tmp_path, teacher):
    _, content, _ = run(tmp_path, split="kfold", folds=3)
    assert content["images"] == 60
    assert content["folds"] == 3


def test_cifar_is_grouped_by_superclasses(tmp_path, monkeypatch):
    confusion = np.load(module.Path(__file__).parents[1] / "golden" / "teacher_confusion.npz")["wrn_40_2"]
    true, predicted = (torch.from_numpy(np.repeat(a.ravel(), confusion.ravel())) for a in np.indices((100, 100)))
    logits = torch.nn.functional.one_hot(predicted, 100)
    monkeypatch.setattr(module, "_loader", lambda *_: torch.zeros(1))
    monkeypatch.setattr(module, "_run", lambda *_: (logits, true))
    monkeypatch.setattr(module, "load_trained", lambda *_, **__: torch.nn.Linear(1, 1))
    _, content, _ = run(tmp_path, dataset="cifar100", num_groups=5, split="train")
    assert content["groups"] == load_groups("wrn_40_2")
    assert content["superclass_groups"][0] == [9, 18, 19]
    _, content, _ = run(tmp_path, dataset="cifar100", num_groups=5, split="train", single_classes=True)
    assert sorted(c for g in content["groups"] for c in g) == list(range(100))
    assert len(content["confusion"]) == 100


@pytest.mark.parametrize("name", ["distances.npy", "distances.json"])
def test_the_distances_of_the_classes_for_wkd(tmp_path, teacher, name):
    path = tmp_path / "made" / name
    text, *_ = run(tmp_path, distances=path)
    assert f"WKD.COST_MATRIX {path}" in text
    image, target = next(iter(dataset_info["digits"].read(None, True).loader(60, 0, train=False)))
    with torch.no_grad():
        expected = class_distances(teacher(image)[1]["pooled_feat"], target)
    torch.testing.assert_close(load_distances(str(path), "WKD.COST_MATRIX").float(), expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"distances": Path("distances.csv")}, "written as .npy or .json, not as 'distances.csv'"),
        ({"num_groups": 6}, "from 1 to 5"),
        ({"num_groups": 0}, "from 1 to 5"),
        ({"split": "tset"}, "test"),
        ({"split": "kfold", "folds": 1}, "two folds"),
        ({"split": "heldout", "val_fraction": 1.0}, "between 0 and 1"),
        ({"dataset": "digit"}, "digits"),
        ({"ckpt": "absent"}, "absent"),
    ],
)
def test_bad_input_is_refused_and_writes_nothing(tmp_path, teacher, options, words):
    with pytest.raises(UserError, match=words):
        run(tmp_path, **options)
    assert not (tmp_path / "made").exists()


def test_a_teacher_without_errors_is_refused(tmp_path, monkeypatch):
    labels = torch.arange(10)
    monkeypatch.setattr(module, "_loader", lambda *_: torch.zeros(1))
    monkeypatch.setattr(module, "_run", lambda *_: (torch.eye(10), labels))
    monkeypatch.setattr(module, "load_trained", lambda *_, **__: torch.nn.Linear(1, 1))
    with pytest.raises(UserError, match="--split kfold"):
        run(tmp_path)
    assert not (tmp_path / "made").exists()
