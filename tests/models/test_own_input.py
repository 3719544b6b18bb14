"""A frozen network that sees the data as its own pipeline would have shown it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from mdistiller.models import build_model, cifar_model_dict
from mdistiller.models.native import NativeInput
from mdistiller.models.own_input import OwnInput, pixels_seen, with_own_input

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
OWN = NativeInput(40, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), interpolation="bicubic")


@pytest.fixture
def network():
    torch.manual_seed(0)
    return build_model(cifar_model_dict, "resnet8", 10).eval().requires_grad_(False)


def normalised(pixels, mean=MEAN, std=STD):
    return v2.functional.normalize(pixels, list(mean), list(std))


@pytest.mark.parametrize("size", [0, 24, 48])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("dtype, within", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_logits_are_those_of_the_networks_own_pipeline(size, interpolation, dtype, within, network):
    """The resize is linear and keeps constants, so that it may come after the normalisation."""
    network, pixels = network.to(dtype), torch.rand(2, 3, 32, 32, dtype=dtype)
    own = NativeInput(size, OWN.mean, OWN.std, interpolation=interpolation)
    resize = v2.Resize(size, v2.InterpolationMode(interpolation), antialias=True) if size else v2.Identity()
    expected = network(normalised(resize(pixels), own.mean, own.std))
    logits, features = OwnInput(network, MEAN, STD, own, size)(normalised(pixels))
    assert (logits - expected[0]).abs().max() <= within * expected[0].abs().max()
    assert [f.shape for f in features["feats"]] == [f.shape for f in expected[1]["feats"]]


def test_the_normalisation_is_one_multiply_add(network):
    own = OwnInput(network, MEAN, STD, OWN)
    scale = torch.tensor(STD, dtype=torch.float64) / torch.tensor(OWN.std, dtype=torch.float64)
    assert torch.equal(own.scale.flatten(), scale.float())
    image = torch.rand(2, 3, 8, 8).to(memory_format=torch.channels_last)
    assert own.seen(image).is_contiguous(memory_format=torch.channels_last)


def test_the_same_input_changes_nothing(network):
    same = NativeInput(32, list(MEAN), STD)
    assert with_own_input(network, MEAN, STD, same) is network
    assert isinstance(with_own_input(network, MEAN, STD, same, size=24), OwnInput)
    assert isinstance(with_own_input(network, MEAN, STD, OWN), OwnInput)


def test_a_resize_alone_leaves_the_numbers_as_they_are(network):
    image = torch.randn(2, 3, 32, 32)
    own = with_own_input(network, MEAN, STD, NativeInput(32, MEAN, STD), size=16)
    assert torch.equal(own.seen(image), F.interpolate(image, (16, 16), mode="bilinear", antialias=True))


def test_the_state_dict_is_the_networks(network):
    own = OwnInput(copy.deepcopy(network), MEAN, STD, OWN, 24)
    assert own.state_dict().keys() == network.state_dict().keys()
    changed = {name: tensor + 1 for name, tensor in network.state_dict().items()}
    holder = torch.nn.ModuleDict({"teacher": own})
    assert list(holder.state_dict()) == [f"teacher.{name}" for name in changed]
    holder.load_state_dict({f"teacher.{name}": tensor for name, tensor in changed.items()})
    assert all(torch.equal(own.network.state_dict()[name], tensor) for name, tensor in changed.items())
    own.load_state_dict(network.state_dict(), strict=True)
    assert torch.equal(own.network.fc.weight, network.fc.weight)
    with pytest.raises(RuntimeError, match=r"fc\.weight"):
        own.load_state_dict({name: tensor for name, tensor in changed.items() if name != "fc.weight"})


def test_it_has_what_the_network_has_and_nothing_else(network):
    own = copy.deepcopy(OwnInput(network, MEAN, STD, OWN))
    assert own.get_stage_channels() == network.get_stage_channels() and len(own.get_bn_before_relu()) == 3
    with pytest.raises(AttributeError, match="nothing"):
        own.nothing  # noqa: B018


def test_it_prints_what_it_does_in_full(network):
    """The key of the teacher's cache depends on it."""
    texts = {
        repr(OwnInput(network, MEAN, STD, own, size))
        for own in (OWN, NativeInput(40, (0.4850001, 0.456, 0.406), OWN.std))
        for size in (0, 24)
    }
    assert len(texts) == 4


def test_the_pixels_that_a_network_sees(network):
    image = torch.zeros(1, 3, 32, 32)
    assert pixels_seen(network, image) == pixels_seen(OwnInput(network, MEAN, STD, OWN), image) == 1024
    assert pixels_seen(OwnInput(network, MEAN, STD, OWN, 64), image) == 4096


@pytest.mark.slow
def test_it_compiles_in_one_graph(network):
    own, image = OwnInput(network, MEAN, STD, OWN, 24), torch.rand(2, 3, 32, 32)
    compiled = torch.compile(own, backend="eager", fullgraph=True)
    assert torch.equal(compiled(image)[0], own(image)[0])
