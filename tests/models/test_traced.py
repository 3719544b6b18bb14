"""torch.jit.trace, torch.export and torch.onnx's old exporter take every network; torch.jit.script says what to do."""

import pytest
import torch

from mdistiller.grouping import published_groups
from mdistiller.models import build_model, cifar_model_dict, imagenet_model_dict, tiny_imagenet_model_dict
from mdistiller.models.grouped import GroupedStudent

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit"), pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]  # fmt: skip

FAMILIES = {
    "cifar": (cifar_model_dict, 32), "tiny_imagenet": (tiny_imagenet_model_dict, 64),
    "imagenet": (imagenet_model_dict, 64),
}  # fmt: skip
CHEAP = {"cifar": ("resnet8", "resnet8x4", "wrn_16_1", "vgg8", "ShuffleV1", "ShuffleV2", "MobileNetV2"),
         "tiny_imagenet": ("MobileNetV2",), "imagenet": ("MobileNetV1",)}  # fmt: skip
NETWORKS = [
    pytest.param(family, name, marks=[] if name in CHEAP[family] else pytest.mark.slow)
    for family, (models, _) in FAMILIES.items() for name in models
]  # fmt: skip


def check(network, size):
    """A traced program returns the logits, for a batch of another size too; the network itself is as it was."""
    torch.manual_seed(0)
    image = torch.randn(2, 3, size, size)
    with torch.no_grad():
        traced = torch.jit.trace(network.eval(), image)
        other = torch.randn(3, 3, size, size)
        logits, features = network(other)
        torch.testing.assert_close(traced(other), logits)
    assert features["feats"]


@pytest.mark.parametrize("family, name", NETWORKS)
def test_every_network_is_traced(family, name):
    models, size = FAMILIES[family]
    check(build_model(models, name, 100), size)


@pytest.mark.parametrize("mode", ["loop", "together"])
def test_a_grouped_student_is_traced(mode):
    network = GroupedStudent(build_model(cifar_model_dict, "resnet8", 100), published_groups("res56"))
    network.set_branch_mode(mode)
    check(network, 32)


class Logits(torch.nn.Module):
    """What people write to export a network of this kind."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, image):
        logits, _ = self.network(image)
        return logits


def test_within_another_module_a_network_is_traced_as_it_is():
    network = Logits(build_model(cifar_model_dict, "resnet8", 10)).eval()
    for count in (1, 2):
        traced = torch.jit.trace(network, torch.randn(count, 3, 32, 32))
        image = torch.randn(4, 3, 32, 32)
        torch.testing.assert_close(traced(image), network(image))


def test_a_traced_student_is_saved_and_loaded(tmp_path):
    network = build_model(cifar_model_dict, "resnet8", 10).eval()
    image = torch.randn(1, 3, 32, 32)
    torch.jit.trace(network, image).save(tmp_path / "student.pt")
    loaded = torch.jit.load(tmp_path / "student.pt")
    torch.testing.assert_close(loaded(image), network(image)[0])


@pytest.mark.parametrize("name", CHEAP["cifar"])
def test_script_says_what_to_do_instead(name):
    with pytest.raises(TypeError, match=r"cannot compile \w+, .*torch\.jit\.trace\(network\.eval\(\), image\)"):
        torch.jit.script(build_model(cifar_model_dict, name, 10))


def test_export_keeps_logits_and_features():
    network = build_model(cifar_model_dict, "resnet8", 10).eval()
    image = torch.randn(2, 3, 32, 32)
    logits, features = torch.export.export(network, (image,)).module()(image)
    torch.testing.assert_close(logits, network(image)[0])
    assert set(features) == {"feats", "preact_feats", "last_map", "pooled_feat"}
