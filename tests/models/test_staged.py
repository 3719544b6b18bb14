"""Trunk, last stage, classifier: the split that DCGD needs; initial weights; BatchNorm statistics."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn as nn

from mdistiller.models import build_model, cifar_model_dict, imagenet_model_dict
from mdistiller.models._staged import StagedNet
from mdistiller.models.cifar.resnet import ResNet
from mdistiller.models.cifar.wrn import WideResNet

LAST_STAGE = {
    "resnet8": ("layer3",),
    "resnet8x4": ("layer3",),
    "wrn_16_1": ("block3", "bn1"),
    "vgg8": ("block4",),
    "ResNet18": ("layer4",),
    "ImageNet ResNet18": ("layer4",),
}


def build(name: str) -> StagedNet:
    torch.manual_seed(0)
    models = imagenet_model_dict if name.startswith("ImageNet") else cifar_model_dict
    return build_model(models, name.split()[-1], 5)  # type: ignore[return-value]


def forward_by_parts(net: StagedNet, stage: nn.Module, image: torch.Tensor) -> torch.Tensor:
    feats, _ = net.forward_trunk(image)
    return net.get_classifier()(net.forward_last(stage, feats[-1])[2])


@pytest.mark.parametrize("name", LAST_STAGE)
@pytest.mark.parametrize("size", [32, 64])
def test_a_branch_with_the_nets_weights_is_the_net(name: str, size: int) -> None:
    net = build(name).eval()
    assert net.last_stage == LAST_STAGE[name]
    branch = net.new_last_stage().eval()
    image = torch.randn(1, 3, size, size)
    with torch.no_grad():
        logits = net(image)[0]
        assert not torch.equal(forward_by_parts(net, branch, image), logits)
        own = {k: v for k, v in net.state_dict().items() if k.split(".")[0] in net.last_stage}
        branch.load_state_dict(own)
        assert torch.equal(forward_by_parts(net, branch, image), logits)
        assert torch.equal(forward_by_parts(net, net, image), logits)


@pytest.mark.parametrize("name", LAST_STAGE)
def test_the_trunk_leaves_out_last_stage_and_classifier(name: str) -> None:
    net = build(name)
    feats, _ = net.forward_trunk(torch.randn(2, 3, 32, 32))
    feats[-1].sum().backward()
    touched = {key.split(".")[0] for key, p in net.named_parameters() if p.grad is not None}
    all_parts = {key.split(".")[0] for key, _ in net.named_parameters()}
    assert all_parts - touched == {*net.last_stage, net.classifier_name}


@pytest.mark.parametrize("name", LAST_STAGE)
def test_initial_weights(name: str) -> None:
    net = build(name)
    # A branch is initialised by the same rule, even from a net that has been trained.
    with torch.no_grad():
        for p in (p for part in net.last_stage for p in getattr(net, part).parameters()):
            p.fill_(3.0)
    branch = net.new_last_stage()
    modules = [m for key, m in net.named_modules() if key.split(".")[0] not in net.last_stage]
    for m in [*modules, *branch.modules()]:
        if isinstance(m, nn.Conv2d):
            # N(0, 2 / (k * k * out)); a sample standard deviation over n weights strays by about 1 / sqrt(2 n).
            std = math.sqrt(2 / (m.kernel_size[0] * m.kernel_size[1] * m.out_channels))
            assert m.weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * m.weight.numel()))
            assert m.bias is None or not m.bias.any()
        elif isinstance(m, nn.BatchNorm2d):
            assert (m.weight == 1).all()
            assert not m.bias.any()


def test_initial_classifiers() -> None:
    vgg, wrn = build("vgg8").get_classifier(), build("wrn_16_1").get_classifier()
    assert vgg.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert not vgg.bias.any()
    assert not wrn.bias.any()
    assert build("resnet8").get_classifier().bias.any()


@pytest.mark.parametrize("name", LAST_STAGE)
def test_each_batchnorm_sees_a_batch_once(name: str) -> None:
    net = build(name).train()
    net(torch.randn(2, 3, 32, 32))
    assert {int(m.num_batches_tracked) for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {1}


def test_stage_sizes_at_twice_the_image() -> None:
    image = torch.randn(1, 3, 64, 64)
    for name, sizes in {"resnet8": [64, 64, 32, 16], "vgg8": [64, 32, 16, 8, 4]}.items():
        assert [f.shape[-1] for f in build(name).eval()(image)[1]["feats"]] == sizes


@pytest.mark.parametrize(("family", "depth"), [(ResNet, 18), (ResNet, 2), (WideResNet, 17), (WideResNet, 4)])
def test_impossible_depth(family: type, depth: int) -> None:
    with pytest.raises(ValueError, match=f"not {depth}"):
        family(depth)
