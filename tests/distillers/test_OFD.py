"""OFD against its three cases; margins against numerical integration; the teacher's mode and statistics."""

import math

import pytest
import torch
import torch.nn as nn
from scipy import integrate, stats
from torch.func import functional_call
from yacs.config import CfgNode as CN

from mdistiller.distillers import OFD, method_defaults
from mdistiller.distillers.OFD import feat_loss, feature_margin
from mdistiller.models import cifar_model_dict

from .._networks import TwoMaps
from .oracles.ofd import naive_feat_loss


def maps(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def margins(channels):
    return -torch.linspace(0.1, 1.5, channels, dtype=torch.float64).view(1, -1, 1, 1)


def build(student, teacher):
    cfg = CN({"OFD": method_defaults["OFD"].clone()})
    return OFD(*(cifar_model_dict[name][0](num_classes=10) for name in (student, teacher)), cfg)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 4, 7), (2, 17, 3, 3)])
def test_agrees_with_the_naive_form(shape):
    source, target, margin = maps(*shape).requires_grad_(), maps(*shape, seed=1), margins(shape[1])
    ours, naive = feat_loss(source, target, margin), naive_feat_loss(source, target, margin)
    assert ours.shape == () and ours.item() == pytest.approx(naive.item(), rel=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(loss, source)[0] for loss in (ours, naive)), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "source, target, expected",
    [
        (3, 1, 4),  # a positive target: penalised above it
        (-2, 1, 9),  # and below it
        (1, -0.25, 1.5625),  # a target in [margin, 0]: penalised only above it
        (-0.25, -0.25, 0),
        (-2, -0.25, 0),
        (0.5, -4, 1),  # a target below the margin: the margin, -1/2, replaces it
        (-0.75, -4, 0),
        (0.5, 0, 0.25),  # zero counts as negative
        (-0.5, 0, 0),
    ],
)
def test_by_hand(source, target, expected):
    one = torch.ones(2, 1, 1, 1, dtype=torch.float64)
    # Two equal samples: the sum over the map, mean over the batch.
    assert feat_loss(source * one, target * one, -0.5 * one[:1]).item() == expected


def test_gradcheck():
    target, margin = maps(2, 3, 2, 2, seed=1), margins(3)
    assert torch.autograd.gradcheck(lambda s: feat_loss(s, target, margin), maps(2, 3, 2, 2).requires_grad_())
    assert torch.autograd.gradcheck(lambda s: 3 * feat_loss(s, target, margin), maps(2, 3, 2, 2).requires_grad_())


def test_float32_and_autocast():
    source, target = maps(4, 8, 16, 16, dtype=torch.float32).requires_grad_(), maps(4, 8, 16, 16, seed=1)
    exact = naive_feat_loss(source.double(), target, margins(8)).item()
    assert feat_loss(source, target.float(), margins(8)).item() == pytest.approx(exact, rel=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = feat_loss(source.bfloat16(), target.bfloat16(), margins(8))
    loss.backward()
    assert loss.dtype == torch.float32 and source.grad.isfinite().all()
    assert loss.item() == pytest.approx(exact, rel=1e-2)


def test_refuses_maps_of_two_shapes():
    with pytest.raises(ValueError, match=r"student's \(1, 2, 3, 3\), the teacher's \(1, 2, 1, 1\)"):
        feat_loss(maps(1, 2, 3, 3), maps(1, 2, 1, 1), margins(2))


def bn(weights, biases):
    norm = torch.nn.BatchNorm2d(len(weights)).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(weights, dtype=torch.float64))
        norm.bias.copy_(torch.tensor(biases, dtype=torch.float64))
    return norm


@pytest.mark.parametrize("mean, std", [(0, 1), (0.3, -0.5), (-2, 0.7), (4, 1), (-40, 1), (30, 1), (1, 0.01)])
def test_margin_against_numerical_integration(mean, std):
    density = stats.norm(mean, abs(std)).logpdf
    scale = density(min(mean, 0))  # factored out of both integrals: far from the mean the density underflows
    width = 12 * abs(std) if mean <= 0 else 40 * min(abs(std), std * std / mean)
    low = min(mean, 0) - width

    def moment(n):
        peak = [mean] if low < mean < 0 else None
        return integrate.quad(lambda x: x**n * math.exp(density(x) - scale), low, 0, points=peak, epsrel=1e-11)[0]

    assert feature_margin(bn([std], [mean])).item() == pytest.approx(moment(1) / moment(0), rel=1e-8)


def test_margin_by_hand_and_at_the_limits():
    found = feature_margin(bn([1, 2, 0, 0, 0, 1e-3, 1, 1], [0, 0, 1, -1, 0, 1e6, 999, 1001])).flatten().tolist()
    half_normal = -math.sqrt(2 / math.pi)
    series = [-(1 / m - 2 / m**3 + 10 / m**5) for m in (999, 1001)]  # either side of 1e3, where the formula changes
    assert found == pytest.approx([half_normal, 2 * half_normal, 0, -1, 0, -1e-12, *series], rel=1e-9, abs=1e-300)
    assert feature_margin(torch.nn.BatchNorm2d(3)).shape == (1, 3, 1, 1)


def test_teacher_is_in_training_mode_but_does_not_change():
    method = build("resnet8", "resnet14").train()
    before = {k: v.clone() for k, v in method.teacher.state_dict().items()}
    image, target = 2 + 3 * torch.randn(4, 3, 32, 32), torch.arange(4)
    _, losses = method(image=image, target=target)
    assert method.teacher.training
    assert all(v.equal(before[k]) for k, v in method.teacher.state_dict().items())
    method.teacher.eval()
    assert method(image=image, target=target)[1]["loss_kd"].item() != losses["loss_kd"].item()


class Counting(nn.Module):
    """A network with BatchNorms of two kinds, and a buffer of its own, which its forward reads and changes."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.count = nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=None, track_running_stats=True)
        self.evaluated = nn.BatchNorm2d(3)
        self.register_buffer("calls", torch.ones(1))

    def forward(self, x):
        self.calls.add_(1)
        return self.evaluated(self.count(self.own(x))) * self.calls, {}


def test_teacher_forward_is_that_on_copies_of_its_buffers():
    """BatchNorm in training mode gets no buffers instead; one in eval mode, and others' buffers, are copied."""
    net, image = Counting(), torch.rand(4, 3, 5, 5)
    for _ in range(3):
        net(torch.rand(4, 3, 5, 5))
    net.train().evaluated.eval()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    expected = functional_call(net, {name: buffer.clone() for name, buffer in before.items()}, (image,))[0]
    model = build("resnet8", "resnet8")
    model.teacher = net
    assert torch.equal(model.teacher_forward(image)[0], expected)
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_margins_move_with_the_method_but_are_not_saved():
    method = build("resnet8", "resnet14")
    assert [m.shape for m in method.margins] == [(1, 16, 1, 1), (1, 32, 1, 1), (1, 64, 1, 1)]
    assert {m.dtype for m in method.double().margins} == {torch.float64}
    own = [k for k in method.state_dict() if not k.startswith(("student.", "teacher."))]
    assert own and all(k.startswith("connectors.connectors.") for k in own)


@pytest.mark.parametrize(
    "student, teacher",
    [
        ("MobileNetV2", "resnet8"),
        ("resnet8", "MobileNetV2"),
        ("ShuffleV1", "wrn_16_1"),
        ("wrn_16_1", "ShuffleV1"),
        ("ShuffleV2", "vgg8"),
        ("vgg8", "ShuffleV2"),
    ],
)
def test_pairs(student, teacher):
    method = build(student, teacher).train()
    _, losses = method(image=torch.randn(2, 3, 32, 32), target=torch.tensor([0, 1]))
    losses["loss_kd"].backward()
    assert losses["loss_kd"] > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.connectors.parameters())


def test_refuses_batchnorms_of_other_widths():
    teacher = cifar_model_dict["resnet8"][0](num_classes=10)
    teacher.get_bn_before_relu = lambda: [torch.nn.BatchNorm2d(5)] * 3
    with pytest.raises(ValueError, match=r"\[16, 32, 64\] in the teacher, .* have \[5, 5, 5\]"):
        OFD(cifar_model_dict["resnet8"][0](num_classes=10), teacher, CN({"OFD": method_defaults["OFD"].clone()}))


def test_a_teacher_without_batchnorms_before_the_relu_is_refused():
    cfg = CN({"OFD": method_defaults["OFD"].clone()})
    with pytest.raises(ValueError, match=r"OFD needs a teacher with get_bn_before_relu\(\).* TwoMaps has none"):
        OFD(cifar_model_dict["resnet8"][0](num_classes=10), TwoMaps(), cfg)


@pytest.mark.parametrize("student, teacher, stages", [("MobileNetV2", "ResNet50", 3), ("resnet8", "resnet14", 3)])
def test_as_many_stages_as_the_original_lists(student, teacher, stages):
    """ResNet50 lists four channels for its five maps, so that the original compares three stages."""
    nets = [cifar_model_dict[name][0](num_classes=10) for name in (student, teacher)]
    method = OFD(*nets, CN({"OFD": method_defaults["OFD"].clone()}))
    assert len(method.connectors.connectors) == stages == min(len(net.get_stage_channels()) - 1 for net in nets)
