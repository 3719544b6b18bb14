"""The output of tools/eval.py for a network with one head and with several."""

import re

import pytest
import torch

from mdistiller.commands.eval import evaluate_checkpoint
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


def test_without_the_groups_the_error_lists_the_names_that_differ(grouped):
    with pytest.raises(UserError, match=r"does not fit ResNet: .* unknown \(base.bn1.bias"):
        evaluate_checkpoint("resnet8", grouped[1], "digits", 64, device="cpu")
