"""The output of tools/eval.py for a network with one head and with several."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mdistiller.commands.eval import evaluate_checkpoint
from mdistiller.dataset import dataset_info
from mdistiller.dataset.folders import ImageFiles
from mdistiller.dataset.image_file import read_pixels
from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.files.checkpoint import save_checkpoint
from mdistiller.errors import UserError
from mdistiller.grouping import load_groups
from mdistiller.models import cifar_model_dict
from mdistiller.models.grouped import GroupedStudent

GROUPS = "configs/digits/groups.json"


@pytest.fixture
def grouped(tmp_path):
    """A grouped resnet8 for digits, and its file."""
    torch.manual_seed(0)
    net = GroupedStudent(cifar_model_dict["resnet8"][0](num_classes=10), load_groups(GROUPS)).eval()
    save_checkpoint({"model": net.state_dict()}, tmp_path / "student_best")
    return net, str(tmp_path / "student_best")


def top1(line):
    return float(re.search(r"top-1 ([\d.]+)", line)[1])


def test_every_head_of_a_grouped_student_is_scored(grouped):
    net, path = grouped
    said = evaluate_checkpoint("resnet8", path, "digits", 64, groups=GROUPS, device="cpu").splitlines()
    assert [line.split()[0] for line in said[:3]] == ["grouped", "single", "mean"]
    parameters = sum(p.numel() for p in net.parameters())
    assert said[-1].startswith(f"resnet8: {parameters / 1e6:.2f} M parameters")


def test_a_head_scored_alone_has_the_same_accuracy(grouped):
    _, path = grouped
    every = evaluate_checkpoint("resnet8", path, "digits", 64, groups=GROUPS, device="cpu").splitlines()
    single = evaluate_checkpoint("resnet8", path, "digits", 64, "single", groups=GROUPS, device="cpu").splitlines()
    assert single[0].startswith("single head: ") and top1(single[0]) == top1(every[1])


def test_an_unknown_head_gets_a_suggestion(grouped):
    with pytest.raises(UserError, match="unknown head 'singel'; did you mean single"):
        evaluate_checkpoint("resnet8", grouped[1], "digits", 64, "singel", groups=GROUPS, device="cpu")


def test_without_the_groups_the_error_lists_the_names_that_differ_and_names_the_option(grouped):
    with pytest.raises(UserError, match=r"does not fit ResNet: .* unknown \(base.bn1.bias.*; it holds .* add --groups"):
        evaluate_checkpoint("resnet8", grouped[1], "digits", 64, device="cpu")


def test_without_a_name_the_run_says_what_it_deploys(grouped, tmp_path):
    _, path = grouped
    overrides = ["DISTILLER.TYPE", "DCGD_CE", "DISTILLER.TEACHER", "resnet14", "DCGD.GROUPS", GROUPS]
    cfg = load_cfg("configs/digits/vanilla.yaml", overrides)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    named = evaluate_checkpoint("resnet8", path, "digits", 64, groups=GROUPS, device="cpu").splitlines()
    said = evaluate_checkpoint(None, path, None, 64, device="cpu").splitlines()
    assert said[:2] == named[:2] and [line.split(":")[0] for line in said[-2:]] == ["grouped", "single"]
    single = evaluate_checkpoint(None, path, None, 64, "single", device="cpu").splitlines()
    assert single[0] == named[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((None, "pretrain", None, 64), "name the network, such as -m resnet20, or a run's checkpoint"),
        ((None, "student_best", None, 64), "no config.yaml next to student_best says which network it holds"),
        ((None, "student_best", None, 64, None, GROUPS), "--groups goes with -m"),
    ],
)
def test_what_cannot_be_scored_without_a_name(arguments, message):
    with pytest.raises(UserError, match=message):
        evaluate_checkpoint(*arguments, device="cpu")


def test_the_data_set_of_the_run_counts(tmp_path):
    (tmp_path / "config.yaml").write_text(load_cfg("configs/digits/vanilla.yaml").dump())
    with pytest.raises(UserError, match="was trained on digits, not on cifar100; leave out -d"):
        evaluate_checkpoint(None, plain_file(tmp_path), "cifar100", 64, device="cpu")
    with pytest.raises(UserError, match="has one head; leave out --head grouped"):
        evaluate_checkpoint(None, plain_file(tmp_path), None, 64, "grouped", device="cpu")


def plain_file(folder):
    save_checkpoint({"model": cifar_model_dict["resnet8"][0](num_classes=10).state_dict()}, folder / "plain")
    return str(folder / "plain")


@pytest.fixture
def broken_images(tmp_path, monkeypatch):
    """Digits whose third of four images cannot be read."""
    for i in range(4):
        Image.fromarray(np.full((32, 32, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"no image")
    files = [(str(tmp_path / f"{i}.png"), i) for i in range(4)]

    def read(root, train, skip_broken=False):
        return ImageFiles.of(files, read_pixels, read_pixels, (0.5,) * 3, (0.5,) * 3, skip_broken)

    monkeypatch.setitem(dataset_info, "digits", replace(dataset_info["digits"], read=read))


def test_a_broken_image_is_refused_with_the_option_of_this_command_or_left_out(grouped, tool, capsys, broken_images):
    command = ("eval.py", "-m", "resnet8", "-d", "digits", "-c", grouped[1], "--groups", GROUPS, "--device", "cpu",
               "--num-workers", "0")  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        tool(*command)
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and line.startswith("error: ") and "2.png cannot be read" in line
    assert line.endswith("put an intact copy there, or add --skip-broken\n")
    tool(*command, "--skip-broken")
    assert "\n3 images in " in capsys.readouterr().out
