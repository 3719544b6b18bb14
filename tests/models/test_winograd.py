"""Winograd's convolution against torch's in float64: every shape it takes, and what it leaves to torch."""

import copy

import pytest
import torch
import torch.nn as nn

from mdistiller.engine.teacher.fold_batchnorm import fold_batchnorm
from mdistiller.models import build_model, cifar_model_dict
from mdistiller.models.winograd import WinogradConv2d, use_winograd

on_x86 = pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="used on x86 with AVX2 alone"
)


def convolution(in_channels, out_channels, bias=True):
    torch.manual_seed(0)
    layer = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)
    own = copy.deepcopy(layer)
    own.__class__ = WinogradConv2d
    return layer.double(), own.prepare()


def maps(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "batch, channels, height, width",
    [(1, (64, 64), 4, 1), (3, (64, 96), 8, 5), (5, (128, 64), 16, 16), (70, (64, 64), 32, 32), (2, (1, 1), 12, 7)],
)
def test_it_is_the_convolution(batch, channels, height, width, bias):
    layer, own = convolution(*channels, bias)
    x = maps(batch, channels[0], height, width)
    with torch.inference_mode():
        expected, found = layer(x.double()), own(x)
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("height, dtype", [(7, torch.float32), (6, torch.float32), (8, torch.float64)])
def test_other_heights_and_types_go_the_usual_way(height, dtype):
    _, own = convolution(64, 64)
    x = maps(2, 64, height, 8).to(dtype)
    own = own.to(dtype)
    with torch.inference_mode():
        assert torch.equal(own(x), nn.functional.conv2d(x, own.weight, own.bias, padding=1))


def test_contiguous_maps_go_the_usual_way():
    _, own = convolution(64, 64)
    x = maps(2, 64, 8, 8).contiguous()
    with torch.inference_mode():
        assert torch.equal(own(x), nn.functional.conv2d(x, own.weight, own.bias, padding=1))


@on_x86
def test_only_convolutions_of_the_kind_change():
    kinds = [
        nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1), nn.Conv2d(64, 64, 3, stride=2, padding=1),
        nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 3, padding=1, groups=2),
        nn.Conv2d(64, 64, 3, padding=2, dilation=2), nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(64, 64, 5, padding=1),
    ]  # fmt: skip
    use_winograd(nn.Sequential(*kinds))
    assert [type(kind) is WinogradConv2d for kind in kinds] == [True] + [False] * 8


@on_x86
@pytest.mark.parametrize(
    "name, count", [("resnet8x4", 3), ("vgg8", 4), ("vgg13", 9), ("wrn_40_2", 22), ("resnet56", 17)]
)
def test_a_whole_network_gives_the_same(name, count):
    network = build_model(cifar_model_dict, name, 100).eval()
    image = maps(4, 3, 32, 32)
    folded = fold_batchnorm(network, image[:1]).to(memory_format=torch.channels_last)
    names = folded.state_dict().keys()
    use_winograd(folded)
    assert sum(isinstance(layer, WinogradConv2d) for layer in folded.modules()) == count
    assert folded.state_dict().keys() == names
    with torch.inference_mode():
        logits, features = folded(image)
        expected, expected_features = network.double()(image.double())
    for own, other in [(logits, expected), *zip(features["feats"], expected_features["feats"])]:
        assert (own - other).abs().max() < 1e-5 * other.abs().max()
