"""What checkpoints say of the images: written into every one of them, and compared wherever one meets data."""

import json
import re

import pytest
import torch

from mdistiller.commands.convert import convert
from mdistiller.commands.eval import evaluate_checkpoint
from mdistiller.commands.export_head import export_head
from mdistiller.commands.group_classes import group_classes
from mdistiller.commands.inspect_features import network_outputs
from mdistiller.engine.build import build_trainer
from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.files.checkpoint import (
    check_classes,
    described,
    description_by,
    description_of,
    found_weights,
    load_checkpoint,
    save_checkpoint,
)
from mdistiller.engine.files.safetensors_file import write_safetensors
from mdistiller.errors import UserError
from mdistiller.models import build_model, cifar_model_dict

DIGITS = [*"0123456789"]
SWAPPED = [*"1023456789"]


def test_an_unknown_thing_is_left_out():
    assert described({"model": 1}) == {"model": 1}
    assert described({}, None, None, None, None) == {}
    whole = described({}, ("a", "b"), (0.5,), (1,), 32)
    assert whole == {"class_names": ["a", "b"], "input": {"mean": [0.5], "std": [1.0], "image_size": 32}}
    assert description_of(whole) == whole


@pytest.mark.parametrize(
    "content",
    [
        None, [], torch.zeros(2), {"class_names": "cat"}, {"class_names": [1, 2]}, {"class_names": {"0": "cat"}},
        {"input": "32"}, {"input": {"mean": "x", "std": ["x"], "image_size": "32"}}, {"class_names": torch.zeros(3)},
    ],
)  # fmt: skip
def test_what_others_keep_under_these_keys_is_ignored(content):
    assert description_of(content) == {}


def test_a_loader_is_asked_for_lists_only():
    class Loader:
        class_names, mean, std, image_size = ["a", "b"], torch.zeros(3), (0.5,), None

    assert description_by(Loader()) == {"class_names": ["a", "b"], "input": {"std": [0.5]}}
    assert description_by(None) == {}


REFUSED = {
    "another order": (
        ["cat", "dog", "emu"], ["dog", "cat", "emu"],
        "FILE was trained on other classes than the data has: label 0 is 'cat' in the checkpoint and 'dog' in the data;"
        " 2 of 3 labels differ. The names are the same in another order: sort the data's classes as the checkpoint has",
    ),
    "another set": (
        ["cat", "dog"], ["cat", "emu"],
        "label 1 is 'dog' in the checkpoint and 'emu' in the data; 1 of 2 labels differ. Only the checkpoint has 'dog' "
        "and only the data has 'emu': take the data that it was trained on, or another checkpoint",
    ),
    "fewer": (
        ["cat", "dog"], ["cat", "dog", "emu"],
        "label 2 is no class in the checkpoint and 'emu' in the data; 1 of 3 labels differ. Only the data has 'emu'",
    ),
    "a name twice": (["crane", "crane"], ["crane", "kite"], "Only the checkpoint has 'crane' and only the data ha"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_other_classes_are_refused_with_the_first_difference(case):
    saved, own, message = REFUSED[case]
    with pytest.raises(UserError, match=re.escape(message)):
        check_classes(described({}, saved), "FILE", own)


@pytest.mark.parametrize(("saved", "own"), [(["a", "b"], ["a", "b"]), ([], ["a"]), (["a"], []), (["a"], None)])
def test_the_same_names_or_none_are_taken(saved, own):
    check_classes(described({}, saved), "FILE", own)


def config(folder, *overrides):
    settings = {
        "LOG.PREFIX": folder, "LOG.WANDB": False, "LOG.SAVE_CHECKPOINT_FREQ": 1, "EXPERIMENT.DEVICE": "cpu",
        "DATASET.TRAIN_FRACTION": 0.1, "SOLVER.EPOCHS": 1, "DISTILLER.STUDENT": "resnet8",
    }  # fmt: skip
    return load_cfg("configs/digits/vanilla.yaml", [*(str(x) for pair in settings.items() for x in pair), *overrides])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of one epoch with an EMA."""
    folder = tmp_path_factory.mktemp("runs")
    build_trainer(config(folder, "SOLVER.EMA", "0.9"), name="digits/run").train()
    return folder / "digits" / "run"


FILES = (
    "latest", "best", "epoch_1", "student_latest", "student_best", "student_1", "student_latest_ema",
    "student_best_ema",
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_every_checkpoint_says_classes_and_input(run, name):
    content = load_checkpoint(run / name)
    assert content["class_names"] == DIGITS
    assert content["input"] == {"mean": [0.305] * 3, "std": [0.3234] * 3, "image_size": 32}
    assert {path.name for path in run.iterdir()} >= {*FILES}
    # torch alone reads it, without any class of ours.
    assert torch.load(run / name, weights_only=True)["class_names"] == DIGITS


def test_converting_keeps_it_there_and_back(run, tmp_path):
    convert(run / "student_best", tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.pth")
    expected = description_of(load_checkpoint(run / "student_best"))
    for name in ("a.safetensors", "b.pth"):
        assert description_of(load_checkpoint(tmp_path / name)) == expected != {}
    content = (tmp_path / "a.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert json.loads(header["__metadata__"]["class_names"]) == DIGITS  # other libraries read them, too


def test_a_teacher_taken_from_a_run_s_file_says_nothing(tmp_path):
    weights = {f"{part}.fc.weight": torch.zeros(2, 2) for part in ("student", "teacher")}
    save_checkpoint(described({"model": weights, "optimizer": {}}, ["a", "b"]), tmp_path / "latest")
    assert found_weights(tmp_path / "latest", "student")[1] == {"class_names": ["a", "b"]}
    assert found_weights(tmp_path / "latest", "teacher")[1] == {}


def test_metadata_of_others_is_no_description(tmp_path):
    weights = {"fc.weight": torch.zeros(2, 2)}
    write_safetensors(weights, tmp_path / "file.safetensors", {"class_names": "not JSON [", "input": "[1]"})
    assert load_checkpoint(tmp_path / "file.safetensors").keys() == {"model"}


@pytest.fixture(params=["torch", "safetensors"])
def swapped(request, run, tmp_path):
    """The run's student with two class names exchanged, in both formats; without names, `_plain`."""
    state = load_checkpoint(run / "student_best")["model"]
    if request.param == "safetensors":
        write_safetensors(state, tmp_path / "student.safetensors", described({}, SWAPPED))
        return tmp_path / "student.safetensors"
    save_checkpoint(described({"model": state}, SWAPPED), tmp_path / "student")
    return tmp_path / "student"


MESSAGE = r"student\S* was trained on other classes .*label 0 is '1' in the checkpoint and '0' in the data; 2 of 10"


def scored(path):
    return evaluate_checkpoint("resnet8", str(path), "digits", 64, device="cpu")


def test_eval_refuses_other_classes(swapped):
    with pytest.raises(UserError, match=MESSAGE):
        scored(swapped)


def test_inspect_features_and_group_classes_refuse_other_classes(swapped, tmp_path):
    with pytest.raises(UserError, match=MESSAGE):
        network_outputs("resnet8", str(swapped), "digits", device="cpu")
    with pytest.raises(UserError, match=MESSAGE):
        group_classes("resnet8", str(swapped), "digits", 2, tmp_path / "groups.json", device="cpu")
    assert not (tmp_path / "groups.json").exists()


def test_files_without_names_load_as_before(run, tmp_path):
    save_checkpoint({"model": load_checkpoint(run / "student_best")["model"]}, tmp_path / "student")
    assert "top-1" in scored(tmp_path / "student") and "top-1" in scored(run / "student_best")
    build_trainer(with_teacher(tmp_path / "student", "KD"), name="x/y")


def with_teacher(path, method):
    options = ["DISTILLER.TYPE", method, "DISTILLER.TEACHER", "resnet8", "DISTILLER.TEACHER_CKPT", str(path)]
    return config(path.parent, *options)


def test_a_teacher_of_other_classes_is_refused_where_its_logits_are_read(swapped):
    with pytest.raises(UserError, match=MESSAGE):
        build_trainer(with_teacher(swapped, "KD"), name="x/y")


@pytest.mark.parametrize("method", ["RKD", "FITNET"])
def test_a_teacher_of_other_classes_may_teach_its_features(swapped, method):
    build_trainer(with_teacher(swapped, method), name="x/y")


def test_resuming_on_other_classes_is_refused(run, tmp_path):
    cfg = config(tmp_path, "SOLVER.EMA", "0.9", "SOLVER.EPOCHS", "2")
    (tmp_path / "digits" / "run").mkdir(parents=True)
    content = load_checkpoint(run / "latest")
    save_checkpoint({**content, "class_names": SWAPPED}, tmp_path / "digits" / "run" / "latest")
    with pytest.raises(UserError, match=r"latest was trained on other classes .*label 0 is '1'.* The names are"):
        build_trainer(cfg, name="digits/run").begin(resume=True)
    del content["class_names"]
    save_checkpoint(content, tmp_path / "digits" / "run" / "latest")
    assert build_trainer(cfg, name="digits/run").begin(resume=True) == 2


def test_an_exported_head_keeps_the_names(tmp_path):
    plain = build_model(cifar_model_dict, "resnet8", 10).state_dict()
    grouped = {"model": {f"base.{name}": tensor for name, tensor in plain.items()}}
    save_checkpoint(described(grouped, DIGITS), tmp_path / "student_best_single")
    export_head(tmp_path / "student_best_single", tmp_path / "plain.pth", "resnet8", "digits")
    assert load_checkpoint(tmp_path / "plain.pth")["class_names"] == DIGITS
