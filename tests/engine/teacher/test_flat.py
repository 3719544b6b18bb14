"""A traced network without the calls of its layers computes the same, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
from torch import fx

from mdistiller.engine.teacher.flat import flatten_calls
from mdistiller.engine.teacher.fold_batchnorm import fold_batchnorm
from mdistiller.models import build_model, cifar_model_dict

IMAGE = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["resnet14", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1"])
@torch.no_grad()
def test_the_same_bits_without_convolutions_and_linear_layers(name: str) -> None:
    net = build_model(cifar_model_dict, name, 100).eval()
    folded = fold_batchnorm(net, IMAGE[:1])
    flat = flatten_calls(copy.deepcopy(folded))
    assert not any(isinstance(layer, (nn.Conv2d, nn.Linear)) for layer in flat.modules())
    assert any(isinstance(layer, nn.Conv2d) for layer in folded.modules())
    for image in (IMAGE, IMAGE.to(memory_format=torch.channels_last)):
        (logits, features), (expected, expected_features) = flat(image), folded(image)
        assert torch.equal(logits, expected)
        for own, theirs in zip(features["feats"], expected_features["feats"]):
            assert torch.equal(own, theirs)
    assert flat.double()(IMAGE.double())[0].dtype == torch.float64  # the weights move with it
    assert torch.equal(copy.deepcopy(flat)(IMAGE.double())[0], flat(IMAGE.double())[0])


class Named(nn.Module):
    """Layers whose flat names are the same, one layer that is called twice, and layers of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ModuleDict({"b_c": nn.Conv2d(3, 3, 1), "twice": nn.Conv2d(3, 3, 1, bias=False)})
        self.a_b = nn.ModuleDict({"c": nn.Conv2d(3, 3, 1)})
        self.a_b_c_weight = nn.Parameter(torch.rand(1))
        self.by_name = nn.Linear(32, 32)
        self.round = nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.by_name(input=self.a["twice"](self.a["twice"](x)))
        return self.round(self.a["b_c"](x) + 2 * self.a_b["c"](x)) * self.a_b_c_weight


@torch.no_grad()
def test_names_that_collide_layers_called_twice_and_padding_by_values() -> None:
    net = Named().eval()
    expected = net(IMAGE)
    flat = flatten_calls(fx.symbolic_trace(copy.deepcopy(net)))
    assert torch.equal(flat(IMAGE), expected)
    assert [type(layer) for layer in flat.modules()][1:] == [nn.Linear, nn.Conv2d]
