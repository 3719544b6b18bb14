"""Files that are missing, unreadable or of another kind, given to every command: one line that names the file."""

import json

import pytest
import torch

from mdistiller.commands.main import main
from mdistiller.models import build_model, cifar_model_dict

from ..experiments.hand_made import write_run

CONFIG = "configs/digits/vanilla.yaml"
PLAN = {"title": "t", "seeds": [0], "methods": {"plain": {"config": CONFIG}}, "over": []}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with every kind of file that is not the right one, and the folder of a run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00\x81" * 50)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00\x81" * 50)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "text").write_text("hello")
    (tmp_path / "plan.yaml").write_text(json.dumps(PLAN))
    torch.save({"model": build_model(cifar_model_dict, "resnet8", 10).state_dict()}, tmp_path / "teacher")
    write_run(tmp_path / "run", [{"train_acc": 40.0, "train_loss": 1.0, "test_acc": 50.0, "lr": 0.1}])
    return tmp_path


BAD = ("missing", "folder", "bytes", "x" * 5000)
# The command line, with {} where a file of the wrong kind stands.
FILES = {
    "config": ["train", "--cfg", "{}"],
    "groups": ["train", "--cfg", "configs/digits/dcgd_kd.yaml", "DISTILLER.TEACHER", "resnet8",
               "DISTILLER.TEACHER_CKPT", "teacher", "DCGD.GROUPS", "{}.json"],
    "teacher": ["train", "--cfg", CONFIG, "DISTILLER.TYPE", "KD", "DISTILLER.TEACHER", "resnet8",
                "DISTILLER.TEACHER_CKPT", "{}"],
    "checkpoint": ["eval", "-m", "resnet8", "-d", "digits", "-c", "{}"],
    "checkpoint of a run": ["eval", "-c", "{}/student_best"],
    "ImageNet": ["train", "--cfg", CONFIG, "DATASET.TYPE", "imagenet", "DATASET.ROOT", "{}"],
    "Tiny-ImageNet": ["train", "--cfg", CONFIG, "DATASET.TYPE", "tiny_imagenet", "DATASET.ROOT", "{}"],
    "plan": ["table", "{}"],
    "run to plot": ["plot", "{}"],
    "run to report": ["report", "{}"],
    "table to report": ["report", "{}.json"],
    "run to inspect": ["inspect-features", "--run", "{}"],
    "network to inspect": ["inspect-features", "-m", "resnet8", "-d", "digits", "-c", "{}"],
    "teacher of the groups": ["group-classes", "-m", "resnet8", "-d", "digits", "--num-groups", "2", "-c", "{}"],
    "file to convert": ["convert", "{}", "out.pth"],
    "safetensors to convert": ["convert", "{}.safetensors", "out.pth"],
    "head to export": ["export-head", "{}", "-o", "out.pth"],
}  # fmt: skip


def refusal(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        main(command)
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("bad", BAD, ids=["missing", "folder", "bytes", "long"])
@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_cannot_be_read(here, capsys, monkeypatch, kind, bad):
    command = [word.format(bad) for word in FILES[kind]]
    before = sorted(path.name for path in here.iterdir())
    assert bad[:200] in refusal(capsys, command)
    assert sorted(path.name for path in here.iterdir()) == before


def test_a_groups_file_that_nests_too_deep(here, capsys):
    assert "deep.json is not a JSON file" in refusal(capsys, [word.format("deep") for word in FILES["groups"]])


# What each command writes, with {} where a folder, or a file below a file, stands in the way.
WRITES = {
    "plot": ["plot", "run", "-o", "{}.png"],
    "report": ["report", "run", "-o", "{}"],
}


@pytest.mark.parametrize("kind", ["plot", "report"])
@pytest.mark.parametrize("place", ["text/below", "taken"])
def test_a_file_that_cannot_be_written(here, capsys, kind, place):
    for name in ("taken", "taken.png"):
        (here / name).mkdir()
    assert f"cannot write {place}" in refusal(capsys, [word.format(place) for word in WRITES[kind]])


def test_a_bad_regular_expression_or_number_of_a_command(here, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["table", "plan.yaml", "--only", "("])
    assert stopped.value.code == 2 and "--only '(' is not a regular expression" in capsys.readouterr().err
    for option, value in (("--seed", "-1"), ("--tsne-images", "-1")):
        said = refusal(capsys, ["inspect-features", "-m", "resnet8", "-d", "digits", "-c", "text", option, value])
        assert option in said
