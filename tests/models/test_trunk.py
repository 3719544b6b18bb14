"""A network without the layers that one of its outputs does not need."""

import copy

import pytest
import torch
import torch.nn as nn

from mdistiller.models import cifar_model_dict
from mdistiller.models.copies import copy_without_hooks
from mdistiller.models.cost import network_cost
from mdistiller.models.sources import build_network
from mdistiller.models.trunk import Trunk, unused_parameters

IMAGE = torch.zeros(1, 3, 32, 32)


def last_map(output):
    return output[1]["feats"][-1]


def trunk(network, image=IMAGE):
    torch.manual_seed(0)
    return Trunk(network, last_map, image)


@pytest.mark.parametrize(
    "name", ["resnet8", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2", "res56_M_r20"]
)
def test_it_computes_the_same_map_with_the_networks_own_layers(name):
    torch.manual_seed(0)
    network = cifar_model_dict[name][0](num_classes=100).eval()
    own = trunk(network)
    assert own.network is not network and own.unused
    image = torch.randn(2, 3, 32, 32)
    assert last_map(own.network(image)).equal(last_map(network(image)))
    names = {n for n, _ in network.named_parameters()}
    assert {n for n, _ in own.network.named_parameters()} == names - set(own.unused)
    assert all(p is network.get_parameter(n) for n, p in own.network.named_parameters())
    assert network_cost(own.network, 32).macs < network_cost(network, 32).macs
    assert network(image)[0].shape == (2, 100)  # the network itself is whole


def test_it_learns_and_moves_with_the_network():
    network = cifar_model_dict["resnet8"][0](num_classes=10)
    own = trunk(network).network
    last_map(own(torch.randn(2, 3, 32, 32))).sum().backward()
    assert network.conv1.weight.grad is not None and network.fc.weight.grad is None
    network.double()
    assert own.bn1.running_mean.dtype == own.conv1.weight.dtype == torch.float64
    twin = copy_without_hooks(own).eval()
    image = torch.randn(2, 3, 32, 32).double()
    network.eval()
    assert last_map(twin(image)).equal(last_map(own(image))) and twin.conv1.weight is not network.conv1.weight


def test_what_was_frozen_stays_so_and_is_found():
    network = cifar_model_dict["resnet8"][0](num_classes=10)
    network.fc.requires_grad_(False)
    assert unused_parameters(network, last_map, IMAGE) == ["fc.weight", "fc.bias"]
    assert [n for n, p in network.named_parameters() if not p.requires_grad] == ["fc.weight", "fc.bias"]
    assert network.bn1.num_batches_tracked == 0 and network.training


def test_it_follows_modes_and_exchanged_layers():
    network = cifar_model_dict["resnet8"][0](num_classes=10)
    own = trunk(network)
    network.bn1 = nn.BatchNorm2d(16)
    network.eval()
    own.follow()
    assert own.network.bn1 is network.bn1 and not own.network.training
    both = copy.deepcopy((network, own))
    both[0].bn1 = nn.BatchNorm2d(16)
    both[1].follow()
    assert both[1].network.bn1 is both[0].bn1 is not network.bn1


class Bound(nn.Module):
    """Its classifier cannot be left out: its output's width is asserted."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 10)

    def forward(self, image):
        x = self.conv(image)
        logits = self.fc(x.mean((2, 3)))
        assert logits.shape[1] == 10
        return logits, {"feats": [x]}


def test_a_network_that_needs_its_layers_stays_whole():
    network = Bound()
    own = trunk(network)
    assert own.network is network and own.unused == ["fc.weight", "fc.bias"]
    own.follow()


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/mobilenetv4_conv_small"])
def test_a_network_of_another_library(name):
    pytest.importorskip(name.split("/")[0])
    network = build_network(name, 4, 64).eval()
    own = trunk(network, torch.zeros(1, 3, 64, 64))
    image = torch.randn(2, 3, 64, 64)
    assert own.network is not network
    assert last_map(own.network(image)).equal(last_map(network(image)))
    assert len(own.network.state_dict()) < len(network.state_dict())
