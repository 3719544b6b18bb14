"""The grouped student: plain loops as the oracle, both modes of computing its branches, every family of networks."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
from torch.nn.utils import parametrizations, weight_norm

from mdistiller.distributed.sync_batchnorm import HostSyncBatchNorm2d, synchronize_batchnorm
from mdistiller.errors import UserError
from mdistiller.models import GroupedStudent, build_model, cifar_model_dict, imagenet_model_dict
from mdistiller.models._residual import BasicBlock, Bottleneck
from mdistiller.models._staged import StagedNet
from mdistiller.models.cifar import resnetv2
from mdistiller.models.cifar.resnet import ResNet, resnet8x4
from mdistiller.models.cifar.vgg import vgg8
from mdistiller.models.cifar.wrn import wrn_16_1
from mdistiller.models.copies import has_hooks
from mdistiller.models.grouped import LinearStemResNet, _side_by_side
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
    assert together._together(image)
    require_equal(loop, together, image)


def require_equal(loop: GroupedStudent, together: GroupedStudent, image: torch.Tensor) -> None:
    """A training step of both, and then an evaluation."""
    weight = torch.arange(15, dtype=torch.float64).reshape(3, 5).cos()
    for student in (loop, together):
        (student(image)[0] * weight).sum().backward()
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


def layers(student: GroupedStudent, *kinds: type) -> list[nn.Module]:
    return [layer for layer in student.branches.modules() if isinstance(layer, kinds)]


def batchnorms(student: GroupedStudent) -> list[nn.Module]:
    return layers(student, nn.BatchNorm2d, nn.SyncBatchNorm)


def replace(parent: nn.Module, make: Callable[[nn.Module], nn.Module], *kinds: type) -> None:
    """Put `make(layer)` in the place of every layer of these kinds."""
    for name, child in list(parent.named_children()):
        if isinstance(child, kinds):
            setattr(parent, name, make(child))
        else:
            replace(child, make, *kinds)


def plain(layer: nn.Module) -> nn.Module:
    """BatchNorm2d again, and not with the settings that the student was built with."""
    own = nn.BatchNorm2d(layer.num_features, eps=0.3, momentum=0.4).double()
    own.load_state_dict(layer.state_dict())
    return own


def biased(layer: nn.Module) -> nn.Module:
    own = nn.Conv2d(layer.in_channels, layer.out_channels, 3, layer.stride, padding=2, dilation=2).double()
    nn.init.constant_(own.bias, 0.1)
    own.weight.data.copy_(layer.weight.mean((2, 3), keepdim=True).expand_as(own.weight))
    return own


def each(found: list[nn.Module], **settings: object) -> None:
    for layer in found:
        for name, value in settings.items():
            setattr(layer, name, value)


def old_weight_norm(student: GroupedStudent) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for layer in layers(student, nn.Conv2d):
            weight_norm(layer)


CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # only names here: no tensor is on a GPU
# What may happen to a student after it is built.
FOLLOWED: dict[str, Callable[[GroupedStudent], object]] = {
    "synchronised on CPUs": lambda s: synchronize_batchnorm(s, CPU),
    "synchronised on GPUs": lambda s: synchronize_batchnorm(s, CUDA),
    "synchronised and back": lambda s: replace(synchronize_batchnorm(s, CUDA).branches, plain, nn.SyncBatchNorm),
    "other settings": lambda s: each(batchnorms(s), eps=0.5, momentum=0.7),
    "frozen statistics": lambda s: [layer.eval() for layer in batchnorms(s)],
    "other convolutions": lambda s: replace(s.branches, biased, nn.Conv2d),
    "no BatchNorm": lambda s: replace(s.branches, lambda _: nn.Identity(), nn.BatchNorm2d),
    "no statistics": lambda s: replace(
        s.branches, lambda b: nn.BatchNorm2d(b.num_features, track_running_stats=False).double(), nn.BatchNorm2d
    ),
    "counts that differ": lambda s: [b.num_batches_tracked.fill_(i) for i, b in enumerate(batchnorms(s))],
    "precision": lambda s: s.float().double(),
}
# Where one wide network would compute something else, or a hook would see something else.
LOOPED: dict[str, Callable[[GroupedStudent], object]] = {
    "one branch evaluates": lambda s: s.branches[1].eval(),
    "one setting differs": lambda s: setattr(batchnorms(s)[-1], "eps", 0.5),
    "one layer differs": lambda s: setattr(s.branches[2].layer3[0], "bn2", nn.Identity()),
    "one layer has other shapes": lambda s: replace(s.branches[1], biased, nn.Conv2d),
    "one layer in two branches": lambda s: setattr(s.branches[1].layer3[0], "bn1", s.branches[0].layer3[0].bn1),
    "layers that mix channels": lambda s: replace(
        s.branches, lambda b: nn.GroupNorm(2, b.num_features).double(), nn.BatchNorm2d
    ),
    "parameters of a block": lambda s: each(layers(s, BasicBlock), scale=nn.Parameter(torch.tensor(0.0))),
    "a mean of all batches": lambda s: each(batchnorms(s), momentum=None),
    "a forward of its own": lambda s: each(layers(s, nn.Conv2d)[:1], forward=lambda x: x.new_ones(3, 64, 4, 4)),
    "a hook": lambda s: layers(s, nn.Conv2d)[-1].register_forward_hook(lambda _, args, output: 2 * output),
    "a hook on the gradient": lambda s: layers(s, nn.Conv2d)[1].register_full_backward_hook(
        lambda _, grad_input, grad_output: (2 * grad_input[0],)
    ),
    "weight norm by hooks": old_weight_norm,
    "a parametrization": lambda s: [parametrizations.spectral_norm(layer) for layer in layers(s, nn.Conv2d)],
}


@pytest.mark.parametrize("change", [*FOLLOWED, *LOOPED])
def test_together_follows_the_branches_layers(change):
    """What is done to a student after it is built has the same effect in both modes."""
    image = _golden.images(0, 3, 16)
    students = []
    for mode in ("loop", "together"):
        student = build("resnet8", mode)
        student(image)  # not only a fresh student
        {**FOLLOWED, **LOOPED}[change](student)
        students.append(student)
    assert students[1]._together(image) == (change in FOLLOWED)
    require_equal(*students, image)


def test_a_copy_has_layers_of_its_own():
    image, student = _golden.images(0, 3, 16), build("resnet8", "together")
    synchronize_batchnorm(student, CPU)
    twins = [copy.deepcopy(student) for _ in range(2)]
    twins[0].set_branch_mode("loop")
    each(batchnorms(student), eps=0.5)
    assert not torch.allclose(student(image)[0], copy.deepcopy(twins[1])(image)[0])
    require_equal(*twins, image)


@pytest.mark.parametrize(
    ("device", "kind"), [(CPU, HostSyncBatchNorm2d), (CUDA, nn.SyncBatchNorm)], ids=["CPUs", "GPUs"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_wide_branch_has_synchronised_batchnorms(family, device, kind):
    """On GPUs nn.SyncBatchNorm, which exchanges statistics there alone: its tensors and its process group."""
    student = build(family)
    synchronize_batchnorm(student, device)
    group = object()
    each(layers(student, kind), process_group=group)
    wide = _side_by_side(list(student.branches))
    first, *others = ([m for m in b.modules() if isinstance(m, kind)] for b in student.branches)
    found = [m for m in wide.modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm))]
    assert [type(m) for m in found] == [kind] * len(first) and first
    for merged, *own in zip(found, first, *others):
        assert merged.process_group is group
        for name in ("weight", "bias", "running_mean", "running_var"):
            assert torch.equal(getattr(merged, name), torch.cat([getattr(layer, name) for layer in own]))
        assert merged.num_batches_tracked is not own[0].num_batches_tracked


def test_compiled_the_branches_are_one_graph_too():
    """Dynamo follows the wide branch, also for layers that were replaced before the first step."""
    eager, compiled = build("resnet8", "together"), build("resnet8", "together")
    for student in (eager, compiled):
        synchronize_batchnorm(student, CUDA)
    compiled.forward = torch.compile(compiled.forward, backend="eager", fullgraph=True)
    require_equal(eager, compiled, _golden.images(0, 3, 16))


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
def test_heads_start_as_in_the_published_code(family):
    """Weights from N(0, 0.001^2), bias 0, whatever the plain network's classifier starts from, which it keeps."""
    torch.manual_seed(0)
    alone = FAMILIES[family]().double()
    student = build(family)
    assert all(torch.equal(v, student.base.state_dict()[k]) for k, v in alone.state_dict().items())
    assert all(not head.bias.any() for head in student.heads)
    for part in (student.heads, student.heads[:1]):  # each on its own scale, so that no head is left out
        weights = torch.cat([head.weight.flatten() for head in part])
        # A sample's mean and standard deviation stray by about std / sqrt(n) and std / sqrt(2 n).
        assert weights.std().item() == pytest.approx(0.001, rel=5 / math.sqrt(2 * weights.numel()))
        assert abs(weights.mean().item()) < 5 * 0.001 / math.sqrt(weights.numel())
        # Normal: 68.3 % within one standard deviation, 57.7 % of a uniform distribution.
        share = (weights.abs() < 0.001).double().mean().item()
        assert share == pytest.approx(0.6827, abs=5 * 0.466 / math.sqrt(weights.numel()))


@pytest.mark.parametrize("device", [None, CPU, CUDA], ids=["local", "CPUs", "GPUs"])
def test_branches_of_a_trained_network_start_anew(device):
    base = FAMILIES["resnet8"]()
    for p in base.parameters():
        nn.init.constant_(p, 3.0)
    base(_golden.images(0, 3, 16).float())
    if device is not None:
        synchronize_batchnorm(base, device)
    student = GroupedStudent(base, GROUPS)
    for layer in batchnorms(student):
        assert (layer.weight == 1).all() and not layer.bias.any()
        assert not layer.running_mean.any() and (layer.running_var == 1).all() and layer.num_batches_tracked == 0
    assert all(layer.weight.std() > 0 for layer in layers(student, nn.Conv2d))


def test_the_plain_networks_hooks_stay_on_it():
    base, calls = FAMILIES["resnet8"](), []
    base.layer3[0].conv1.register_forward_hook(lambda *_: calls.append("base"))
    base.layer3.register_forward_pre_hook(lambda *_: calls.append("base"))
    student = GroupedStudent(base, GROUPS)
    assert has_hooks(student.base) and not has_hooks(student.branches)
    student(_golden.images(0, 2, 32).float())
    assert len(calls) == 2


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
