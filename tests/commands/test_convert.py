"""Conversion of weights between torch checkpoints and safetensors, through the tools."""

import argparse
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from mdistiller.commands.convert import convert
from mdistiller.engine.files.checkpoint import load_checkpoint, load_model_weights, save_checkpoint
from mdistiller.errors import UserError
from mdistiller.models import build_model, cifar_model_dict


@pytest.fixture
def student(tmp_path):
    torch.manual_seed(0)
    net = build_model(cifar_model_dict, "resnet8", 10)
    save_checkpoint({"model": net.state_dict()}, tmp_path / "student_best")
    whole = {f"student.{k}": v for k, v in net.state_dict().items()} | {"teacher.fc.bias": torch.zeros(3)}
    save_checkpoint({"epoch": 3, "model": whole, "optimizer": {}, "best_acc": 1.0}, tmp_path / "best")
    return net.state_dict()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("source", ["student_best", "best"])
def test_a_round_trip_keeps_every_bit(tmp_path, student, tool, capsys, source):
    tool("convert.py", tmp_path / source, tmp_path / "net.safetensors")
    assert equal(load_file(tmp_path / "net.safetensors"), student), "as the format's own library reads it"
    tool("convert.py", tmp_path / "net.safetensors", tmp_path / "net.pth")
    assert equal(torch.load(tmp_path / "net.pth", weights_only=True)["model"], student)
    count = sum(tensor.numel() for tensor in student.values())
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"wrote {tmp_path}/net.pth: {len(student)} tensors, {count:,} numbers"


def test_eval_reads_safetensors(tmp_path, student, tool, capsys):
    tool("convert.py", tmp_path / "best", tmp_path / "net.safetensors")
    capsys.readouterr()
    scores = []
    for name in ("net.safetensors", "student_best"):
        tool("eval.py", "-m", "resnet8", "-d", "digits", "-c", tmp_path / name, "--device", "cpu")
        scores.append(capsys.readouterr().out.partition(", loss")[0])
    assert scores[0] == scores[1] and scores[0].startswith("top-1 ")


def test_files_that_others_wrote_load(tmp_path, student):
    save_file(student, tmp_path / "foreign.safetensors")
    assert equal(load_checkpoint(tmp_path / "foreign.safetensors")["model"], student)


def test_tensors_that_share_memory_and_odd_types_are_written(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3)
    state = {"a": weight, "b": weight.T, "c": torch.tensor(3), "d": torch.zeros(0, 2), "e": torch.ones(3).bfloat16()}
    save_checkpoint(state, tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out.safetensors")
    assert equal(load_checkpoint(tmp_path / "out.safetensors")["model"], state)


def test_damage_is_detected(tmp_path, student, tool):
    path = tmp_path / "net.safetensors"
    tool("convert.py", tmp_path / "student_best", path)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for at in (*range(0, header, 41), header, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        try:
            # In the header's metadata, a flipped bit loses at most the checksum; the weights stay correct.
            assert equal(load_checkpoint(path)["model"], student) and at < header
        except UserError as error:
            assert "is not a readable checkpoint" in str(error)
    for length in (0, 4, 8, 500, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="is not a readable checkpoint"):
            load_checkpoint(path)


@pytest.mark.parametrize(
    "source, target, message",
    [
        ("none", "out.safetensors", "no checkpoint at .*none"),
        ("best", "best", "would be written over itself"),
        ("empty", "out.pth", "holds no network weights"),
        ("best", "nowhere/out.safetensors", r"cannot write .*out\.safetensors \(No such file or directory\)"),
    ],
)
def test_what_cannot_be_converted_gets_a_one_line_error(tmp_path, student, tool, capsys, source, target, message):
    save_checkpoint({"epoch": 1}, tmp_path / "empty")
    with pytest.raises(SystemExit) as stopped:
        tool("convert.py", tmp_path / source, tmp_path / target)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and re.search(message, line)
    assert equal(load_checkpoint(tmp_path / "student_best")["model"], student)


def test_another_architecture_is_refused(tmp_path, student, tool):
    tool("convert.py", tmp_path / "best", tmp_path / "net.safetensors")
    with pytest.raises(UserError, match=r"net\.safetensors does not fit"):
        load_model_weights(build_model(cifar_model_dict, "resnet14", 10), tmp_path / "net.safetensors")


def test_one_of_several_state_dicts_is_written(tmp_path, student, tool, capsys):
    averaged = {name: tensor + 1 for name, tensor in student.items()}
    content = {"state_dict": student, "state_dict_ema": averaged, "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "model_best.pth.tar")
    tool("convert.py", tmp_path / "model_best.pth.tar", tmp_path / "ema.safetensors", "--key", "state_dict_ema")
    assert equal(load_file(tmp_path / "ema.safetensors"), averaged)
    tool("convert.py", tmp_path / "model_best.pth.tar", tmp_path / "net.safetensors")
    assert equal(load_file(tmp_path / "net.safetensors"), student)
    assert capsys.readouterr().err == (
        f"note: {tmp_path}/model_best.pth.tar holds several state dicts: state_dict, state_dict_ema; --key NAME writes "
        "another one\n"
    )
    with pytest.raises(SystemExit):
        tool("convert.py", tmp_path / "model_best.pth.tar", tmp_path / "none", "--key", "model")
    assert "holds no weights under 'model'; it holds state_dict, state_dict_ema" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_the_teacher_is_taken_out_of_a_run(tmp_path, student, tool):
    tool("convert.py", tmp_path / "best", tmp_path / "teacher", "--key", "teacher")
    assert list(load_checkpoint(tmp_path / "teacher")["model"]) == ["fc.bias"]
