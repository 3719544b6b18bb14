"""The grouped student: plain loops as the oracle, both modes of computing its branches, every family of networks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn

from mdistiller.errors import UserError
from mdistiller.models import GroupedStudent, build_model, cifar_model_dict, imagenet_model_dict
from mdistiller.models._residual import BasicBlock, Bottleneck
from mdistiller.models._staged import StagedNet
from mdistiller.models.cifar import resnetv2
from mdistiller.models.cifar.resnet import ResNet, resnet8x4
from mdistiller.models.cifar.vgg import vgg8
from mdistiller.models.cifar.wrn import wrn_16_1
from mdistiller.models.grouped import LinearStemResNet
from mdistiller.models.imagenet import resnet as imagenet

from .. import _golden

GROUPS = [[4, 0], [1], [3, 2]]
SIZES = (1, 1, 1, 1)
# A small network of every family: CIFAR, Tiny-ImageNet (ResNet18) and ImageNet.
FAMILIES = {
    "resnet8": lambda: ResNet(8, num_classes=5),
    "resnet14": lambda: ResNet(14, num_classes=5),
    "published": lambda: LinearStemResNet(8, num_classes=5),
    "resnet8x4": lambda: resnet8x4(5),
    "wrn_16_1": lambda: wrn_16_1(5),
    "vgg8": lambda: vgg8(5),
    "ResNet18": lambda: resnetv2.ResNet(BasicBlock, SIZES, 5),
    "ImageNet ResNet18": lambda: imagenet.ResNet(BasicBlock, SIZES, 5),
    "ImageNet ResNet50": lambda: imagenet.ResNet(Bottleneck, SIZES, 5),
}


def build(family: str, mode: str = "loop") -> GroupedStudent:
    torch.manual_seed(0)
    return GroupedStudent(FAMILIES[family](), GROUPS, mode).double()


def test_logits_are_the_heads_outputs_in_class_order():
    student = build("resnet8").eval()
    image = _golden.images(0, 2, 32)
    logits, features = student(image)
    trunk = student.base.forward_trunk(image)[0][-1]
    for group, branch, head in zip(GROUPS, student.branches, student.heads):
        pooled = branch.layer3(trunk)[0].mean(dim=(2, 3))
        for k, c in enumerate(group):
            expected = pooled @ head.weight[k] + head.bias[k]
            torch.testing.assert_close(logits[:, c], expected, rtol=1e-12, atol=1e-12)
    single, plain_features = student.base(image)
    assert torch.equal(features["logits_single"], single)
    assert {*plain_features, "logits_single"} == set(features)
    assert [f.shape for f in features["feats"]] == [f.shape for f in plain_features["feats"]]


@pytest.mark.parametrize("family", FAMILIES)
def test_together_equals_the_loop(family):
    """Logits, gradients, BatchNorm's statistics and the eval-mode logits after them, to 1e-9 in float64."""
    loop, together = build(family), build(family, "together")
    image = _golden.images(0, 3, 64 if family.startswith("ImageNet") else 16)
    weight = torch.arange(15, dtype=torch.float64).reshape(3, 5).cos()
    for student in (loop, together):
        (student.train()(image)[0] * weight).sum().backward()
    for (name, a), b in zip(loop.named_parameters(), together.parameters()):
        if a.grad is None:
            assert b.grad is None, name
        else:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-9, atol=1e-9 * float(a.grad.norm()) + 1e-12, msg=name)
    state = together.state_dict()
    for name, a in loop.state_dict().items():
        torch.testing.assert_close(state[name], a, rtol=1e-9, atol=1e-12, msg=name)
    with torch.no_grad():
        a, b = (student.eval()(image)[0] for student in (loop, together))
    torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


def test_evaluating_changes_no_statistics():
    student = build("resnet8", "together").eval()
    before = copy.deepcopy(student.state_dict())
    with torch.inference_mode():
        student(_golden.images(0, 2, 32))
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())


def test_auto_is_a_loop_on_the_cpu(monkeypatch):
    student = build("resnet8", "auto")
    monkeypatch.setattr(student, "_pooled_together", lambda x: pytest.fail("together on the CPU"))
    student(_golden.images(0, 2, 32))


@pytest.mark.parametrize("family", FAMILIES)
def test_state_names(family):
    student = build(family)
    base = [f"base.{name}" for name in student.base.state_dict()]
    last = [n for n in student.base.state_dict() if n.split(".")[0] in student.base.last_stage]
    branches = [f"branches.{g}.{name}" for g in range(3) for name in last]
    heads = [f"heads.{g}.{name}" for g in range(3) for name in ("weight", "bias")]
    assert list(student.state_dict()) == base + branches + heads
    assert [head.out_features for head in student.heads] == [2, 1, 2]


def test_copies_and_moves_keep_working():
    student = build("resnet8", "together")
    twin = copy.deepcopy(student).float().eval()
    image = _golden.images(0, 2, 32)
    with torch.no_grad():
        for p in student.parameters():
            p.zero_()
        assert twin(image.float())[0].abs().sum() > 0
        twin.set_branch_mode("loop")
        expected = twin(image.float())[0]
        twin.set_branch_mode("together")
        torch.testing.assert_close(twin(image.float())[0], expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast():
    student = build("resnet8", "together").float()
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = student(_golden.images(0, 2, 32).float())
    logits.float().sum().backward()
    assert student.branches[0].layer3[0].conv1.weight.grad.isfinite().all()


def test_what_distillers_call_is_passed_on_to_the_plain_network():
    student = build("resnet8")
    assert student.get_stage_channels() == student.base.get_stage_channels()
    assert student.get_bn_before_relu() == student.base.get_bn_before_relu()
    assert len(student.get_feat_modules()) == len(student.base.get_feat_modules())


@pytest.mark.parametrize("name", ["res56_M_r20", "res56_M_r32", "res56_M_r44", "wrn_M_r20", "wrn_M_r32", "wrn_M_r44"])
def test_published_students(name):
    student = build_model(cifar_model_dict, name, 100)
    sizes = [15, 10, 25, 15, 35] if name.startswith("res56") else [15, 30, 15, 15, 25]
    assert [len(g) for g in student.groups] == sizes
    blocks = {"r20": 3, "r32": 5, "r44": 7}[name[-3:]]
    assert len(student.base.layer3) == len(student.branches[4].layer3) == blocks
    with pytest.raises(UserError, match="another data set"):
        build_model(cifar_model_dict, name, 10)


@pytest.mark.parametrize(
    ("models", "name"),
    [(cifar_model_dict, "resnet20"), (cifar_model_dict, "wrn_40_2"), (imagenet_model_dict, "ResNet34")],
)
def test_registered_networks_can_be_grouped(models, name):
    with torch.device("meta"):
        base = build_model(models, name, 5)
    assert isinstance(base, StagedNet)
    assert len(GroupedStudent(base, GROUPS).branches) == 3


def test_published_students_have_no_relu_after_the_stem():
    """As in the pinned values; the same weights in the ordinary ResNet give other logits."""
    published, plain = FAMILIES["published"]().eval(), FAMILIES["resnet8"]().eval()
    plain.load_state_dict(published.state_dict())
    image = _golden.images(0, 1, 32).float()
    assert published.forward_trunk(image)[0][0].min() < 0
    assert plain.forward_trunk(image)[0][0].min() == 0
    assert not torch.allclose(plain(image)[0], published(image)[0])


def test_networks_without_a_last_stage_are_refused():
    with pytest.raises(UserError, match="no last stage"):
        GroupedStudent(nn.Linear(3, 5), GROUPS)
    with pytest.raises(UserError, match="twice"):
        GroupedStudent(build_model(cifar_model_dict, "resnet8", 5), [[0, 1, 2, 3, 4], [4]])
    with pytest.raises(UserError, match="loop"):
        GroupedStudent(build_model(cifar_model_dict, "resnet8", 5), GROUPS, "lop")
