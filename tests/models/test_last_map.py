"""Every network's last map and classifier: classifier(mean of the map) are its logits."""

import copy

import pytest
import torch
import torch.nn as nn

from mdistiller.engine.teacher.flat import flatten_calls
from mdistiller.engine.teacher.fold_batchnorm import fold_batchnorm
from mdistiller.errors import UserError
from mdistiller.models import cifar_model_dict, imagenet_model_dict, tiny_imagenet_model_dict
from mdistiller.models.build import build_model
from mdistiller.models.classifier import PointwiseLinear, classifier_of
from mdistiller.models.grouped import GroupedStudent, published_students
from mdistiller.models.native import NativeInput
from mdistiller.models.own_input import OwnInput
from mdistiller.models.sources import build_network
from mdistiller.models.wrapped import wrap

from .._networks import Net

PLAIN = [name for name in cifar_model_dict if name not in published_students]
NETWORKS = (
    [(cifar_model_dict, name, 32) for name in PLAIN]
    + [(tiny_imagenet_model_dict, name, 64) for name in tiny_imagenet_model_dict if name not in published_students]
    + [(imagenet_model_dict, name, 64) for name in imagenet_model_dict]
)
LARGE = ("ResNet101", "ResNet152", "resnet110", "vgg16", "vgg19")
# The networks whose last map is not the last of `feats`.
OTHERS = ("wrn_16_1", "wrn_16_2", "wrn_40_1", "wrn_40_2", "ShuffleV2", "MobileNetV2")


def images(size=32, count=2):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def from_map(network, features):
    return classifier_of(network)(features["last_map"].mean((2, 3)))


@pytest.mark.parametrize(
    "registry, name, size",
    [
        pytest.param(*case, id=f"{case[0].kind} {case[1]}", marks=pytest.mark.slow if case[1] in LARGE else ())
        for case in NETWORKS
    ],
)
def test_the_classifier_of_the_mean_gives_the_logits(registry, name, size):
    torch.manual_seed(0)
    network = build_model(registry, name, 7).eval()
    with torch.no_grad():
        logits, features = network(images(size))
        torch.testing.assert_close(from_map(network, features), logits)
    torch.testing.assert_close(features["last_map"].mean((2, 3)), features["pooled_feat"])
    classifier = classifier_of(network)
    assert isinstance(classifier, nn.Linear) and (classifier.out_features, classifier.bias.shape) == (7, (7,))
    if registry is cifar_model_dict:
        assert (features["last_map"] is features["feats"][-1]) == (name not in OTHERS)


def test_a_grouped_student_has_those_of_its_plain_network():
    network = GroupedStudent(build_model(cifar_model_dict, "wrn_16_1", 4), [[0, 2], [1, 3]]).eval()
    _, features = network(images())
    assert classifier_of(network) is network.base.fc
    torch.testing.assert_close(from_map(network, features), features["logits_single"])


def test_a_network_behind_another_input_and_a_compiled_one():
    network = build_model(cifar_model_dict, "MobileNetV2", 4)
    native = NativeInput(mean=(0.5,) * 3, std=(0.25,) * 3, size=32)
    assert classifier_of(OwnInput(network, (0.4,) * 3, (0.2,) * 3, native)) is network.classifier[0]
    assert classifier_of(torch.compile(network, backend="eager")) is network.classifier[0]


def test_a_convolution_as_a_linear_layer():
    network = build_model(tiny_imagenet_model_dict, "MobileNetV2", 5)
    classifier = classifier_of(network)
    assert isinstance(classifier, PointwiseLinear) and list(classifier.parameters()) == []
    x = torch.randn(3, 1280)
    classifier(x).sum().backward()
    assert torch.equal(network.conv2.weight.grad.flatten(1), x.sum(0).expand(5, -1))
    assert torch.equal(network.conv2.bias.grad, torch.full((5,), 3.0))
    plain = copy.deepcopy(classifier)
    assert type(plain) is nn.Linear and set(plain.state_dict()) == {"weight", "bias"}
    assert torch.equal(plain(x), classifier(x))
    twin = copy.deepcopy(network)
    assert classifier_of(twin).weight.data_ptr() == twin.conv2.weight.data_ptr()


FOREIGN = {  # network -> the map's form at 64x64, and whether it is the last of `feats`
    "torchvision/resnet18": ((512, 2), True),
    "torchvision/efficientnet_b0": ((1280, 2), True),
    "torchvision/shufflenet_v2_x0_5": ((1024, 2), True),
    "timm/resnet18": ((512, 2), True),
    "timm/efficientnet_lite0": ((1280, 2), False),
    "timm/mixer_s16_224": ((512, 4), False),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_networks_of_other_libraries(name):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    (width, height), last = FOREIGN[name]
    torch.manual_seed(0)
    network = build_network(name, 6, 64).eval()
    with torch.no_grad():
        logits, features = network(images(64))
        torch.testing.assert_close(from_map(network, features), logits, rtol=1e-4, atol=1e-5)
    assert features["last_map"].shape == (2, width, height, height)
    assert (features["last_map"] is features["feats"][-1]) == last


class Between(nn.Module):
    """Something lies between the mean of its map and its classifier."""

    def __init__(self, between):
        super().__init__()
        self.conv, self.pool, self.between = nn.Conv2d(3, 4, 3, 4), nn.AdaptiveAvgPool2d(1), between
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.between(self.pool(self.conv(x).relu()).flatten(1)))


def test_the_input_of_the_pooling_is_the_map():
    torch.manual_seed(0)
    network = wrap(Between(nn.Dropout(0.5)), 5, 32).eval()
    logits, features = network(images())
    assert torch.equal(features["last_map"], network.bare.conv(images()).relu())  # the ReLU is no layer
    torch.testing.assert_close(from_map(network, features), logits)


def test_where_no_map_has_the_mean_the_last_stage_stands_for_it():
    network = wrap(Between(nn.LayerNorm(4)), 5, 32).eval()
    _, features = network(images())
    assert features["last_map"] is features["feats"][-1] and classifier_of(network) is network.bare.fc
    perceptron = wrap(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), 5, 2)
    assert "last_map" not in perceptron(images(2))[1]


def test_a_network_without_one_classifier_is_named():
    network = wrap(nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.AdaptiveAvgPool2d(2), nn.Flatten()), 16, 32)
    with pytest.raises(UserError, match="Sequential has no layers that give its logits"):
        classifier_of(network)
    with pytest.raises(UserError, match=r"Net does not tell its classifier; give it a method get_classifier\(self\)"):
        classifier_of(Net())
    twice = build_model(cifar_model_dict, "resnet8", 4)
    twice.fc = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 4))
    with pytest.raises(UserError, match="the classifier of ResNet is Sequential, not one linear layer"):
        classifier_of(twice)


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2"])
def test_the_folded_and_flat_teacher_returns_it(name):
    torch.manual_seed(0)
    network = build_model(cifar_model_dict, name, 4).eval().requires_grad_(False)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.bias.normal_(0, 0.5)
    fast = flatten_calls(fold_batchnorm(network, images(count=1), ["last_map"]))
    (logits, own), (wanted, features) = fast(images()), network(images())
    assert set(own) == {"last_map"}
    torch.testing.assert_close(own["last_map"], features["last_map"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
