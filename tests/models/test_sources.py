"""Networks by name: what each source builds, tells and refuses."""

import json
import sys
from collections import OrderedDict

import pytest
import torch
import torch.nn as nn
import torchvision

from mdistiller.errors import UserError
from mdistiller.models.catalog import create_model, list_models
from mdistiller.models.native import native_input
from mdistiller.models.sources import build_network, is_foreign, source_dict
from mdistiller.models.wrapped import WrappedNetwork

CODE = """
import torch.nn as nn
from {neighbour} import WIDTH

INPUT = {{"size": 48, "mean": (0.5, 0.5, 0.5)}}

def small(num_classes, image_size, pretrained=False):
    net = nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(WIDTH, num_classes))
    net.given = image_size, pretrained
    return net

class Ours(nn.Module):
    def __init__(self, num_classes=7):
        super().__init__()
        self.fc = nn.Linear(3, num_classes)
    def forward(self, x):
        pooled = x.mean((2, 3))
        return self.fc(pooled), {{"pooled_feat": pooled}}

def nothing(num_classes): return 5
def classless(): return nn.Identity()
def faulty(num_classes): raise ZeroDivisionError("mine")
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A file with networks, in the current folder, which imports its neighbour."""
    neighbour = f"neighbour_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{neighbour}.py").write_text("WIDTH = 4\n")
    (tmp_path / "mine.py").write_text(CODE.format(neighbour=neighbour))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_names_of_other_sources():
    foreign = ["timm/resnet18", "torchvision/vit_b_16", "hf-hub:user/repo", "a/file.py:function", "file.py:f"]
    assert all(map(is_foreign, foreign)) and not is_foreign("resnet56")


def test_a_bare_name_is_of_this_library():
    assert type(build_network("ResNet18", 5, 32)).__module__.endswith("cifar.resnetv2")
    assert type(build_network("ResNet18", 5, 224)).__module__.endswith("imagenet.resnet")
    with pytest.raises(UserError, match=r"unknown network 'resnt56'; did you mean resnet56"):
        build_network("resnt56", 5)
    with pytest.raises(UserError, match="network of this library, whose maps are fixed"):
        build_network("resnet8", 5, feats=["layer1"])
    with pytest.raises(UserError, match="resnet8 fetches no weights itself; name their file"):
        build_network("resnet8", 5, pretrained=True)


def test_a_users_function(code):
    net = build_network("mine.py:small", 6, 20)
    assert isinstance(net, WrappedNetwork) and net.bare.given == (20, False)
    logits, features = net(torch.rand(2, 3, 20, 20))
    assert logits.shape == (2, 6) and features["feats"][0].shape == (2, 4, 18, 18)
    assert build_network(f"{code}/mine.py:small", 6).bare.given == (48, False)
    assert build_network("mine.py:small", 6, pretrained=True).bare.given == (48, True)
    assert native_input("mine.py:small").size == 48 and native_input("mine.py:small").std == (0.229, 0.224, 0.225)


def test_a_file_that_was_edited_is_run_again(tmp_path):
    """As between the cells of a notebook."""
    path = tmp_path / "edited.py"
    for width in (4, 16):
        layers = f"nn.Conv2d(3, {width}, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear({width}, num_classes)"
        path.write_text(f"import torch.nn as nn\ndef make(num_classes): return nn.Sequential({layers})")
        assert build_network(f"{path}:make", 10, 32).classifier_width == width
        assert type(build_network(f"{path}:make", 10, 32)) is WrappedNetwork


def test_a_users_network_of_our_form_is_not_wrapped(code):
    net = build_network("mine.py:Ours", 6)
    assert type(net).__name__ == "Ours" and create_model("mine.py:Ours").fc.out_features == 7


def test_a_users_file_in_the_home_folder(code, monkeypatch):
    monkeypatch.setenv("HOME", str(code))
    monkeypatch.setenv("USERPROFILE", str(code))
    assert build_network("~/mine.py:small", 3, 20)(torch.rand(1, 3, 20, 20))[0].shape == (1, 3)


@pytest.mark.parametrize(
    "name, message",
    [
        ("mine.py:smal", r"unknown function of mine\.py 'smal'; did you mean small"),
        ("mien.py:small", r"no file mien\.py \(from .*\); did you mean mine\.py"),
        ("mine.py", r"is a file; name a function of it too: path/to/file\.py:FUNCTION"),
        ("mine.py:nothing", "mine.py:nothing returns int, not a torch.nn.Module"),
        ("mine.py:classless", "takes no num_classes"),
        ("torchvison/resnet18", "unknown source of networks 'torchvison'; did you mean torchvision"),
        ("torchvision/resnt18", "unknown network 'torchvision/resnt18'; did you mean torchvision/resnet18"),
        ("timm/resnet81", "unknown network 'timm/resnet81'; did you mean timm/resnet18"),
        ("timm/resnet18.a1_in2k", r"unknown network 'timm/resnet18\.a1_in2k'; did you mean timm/resnet18\.a1_in1k"),
        ("timm/zzzzzz", r"no name resembles it \(`mdistiller models 'timm/\*'` lists all\)"),
    ],
)
def test_wrong_names(name, message, code):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    with pytest.raises(UserError, match=message) as error:
        build_network(name, 5, 32)
    assert "\n" not in str(error.value)


def test_an_error_of_the_users_code_keeps_its_traceback(code):
    with pytest.raises(ZeroDivisionError, match="mine"):
        build_network("mine.py:faulty", 5)


def test_timm_is_imported_only_when_it_is_named_and_its_absence_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    names = list_models()
    assert "torchvision/resnet18" in names and "resnet56" in names and not any(n.startswith("timm") for n in names)
    assert build_network("torchvision/shufflenet_v2_x0_5", 5, 64).name == "torchvision/shufflenet_v2_x0_5"
    for name in ("timm/resnet18", "hf-hub:user/repo"):
        with pytest.raises(UserError, match=r"`pip install -e \.\[timm\]` \(or `pip install timm`\) installs it"):
            build_network(name, 5)
    with pytest.raises(UserError, match="pip install"):
        list_models("timm/*")


def test_native_inputs():
    own = native_input("torchvision/efficientnet_b1")
    assert (own.size, own.interpolation) == (240, "bilinear") and own.crop == pytest.approx(240 / 255)
    pytest.importorskip("timm")
    own = native_input("timm/tf_efficientnet_lite2")
    assert (own.size, own.mean, own.std, own.interpolation) == (260, (0.5,) * 3, (0.5,) * 3, "bicubic")
    assert own.crop == 0.89


def test_a_transformer_is_made_for_the_images_size():
    pytest.importorskip("timm")
    assert build_network("timm/vit_tiny_patch16_224", 5, 64)(torch.rand(1, 3, 64, 64))[0].shape == (1, 5)


def test_images_that_a_network_does_not_take_are_one_line():
    with pytest.raises(UserError, match=r"alexnet does not take images .*it takes 64x64"):
        build_network("torchvision/alexnet", 5, 32)
    with pytest.raises(UserError, match=r"torchvision/vit_b_16 takes no images of 33 pixels \(Input shape indivisible"):
        build_network("torchvision/vit_b_16", 5, 33)


def test_an_error_of_a_librarys_network_is_one_line(monkeypatch):
    class Picky(nn.Module):
        def forward(self, x):
            raise ValueError("only multiples of 48")

    torchvisions = type(source_dict["torchvision"])
    monkeypatch.setattr(torchvisions, "build", lambda *args: Picky())
    with pytest.raises(UserError, match=r"torchvision/resnet18 cannot take images of 64x64 \(.*multiples of 48\)"):
        build_network("torchvision/resnet18", 5, 64)


def test_auxiliary_classifiers_are_left_out():
    net = build_network("torchvision/googlenet", 5, 64).train()
    assert net(torch.rand(2, 3, 64, 64))[0].shape == (2, 5)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torch's cache of downloaded files, with published weights of resnet18 for 1000 classes."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    state = torchvision.models.resnet18().state_dict()
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    file = tmp_path / "hub/checkpoints" / weights.url.rsplit("/", 1)[-1]
    file.parent.mkdir(parents=True)
    torch.save(state, file)
    return state


def test_published_weights_of_torchvision_and_a_fresh_head(hub):
    net = build_network("torchvision/resnet18", 1000, 32, pretrained=True)
    assert not net.fresh_head and all(torch.equal(value, hub[key]) for key, value in net.state_dict().items())
    net = build_network("torchvision/resnet18", 5, 32, pretrained=True)
    assert net.fresh_head and net.bare.fc.weight.shape == (5, 512)
    assert torch.equal(net.bare.layer4[1].conv2.weight, hub["layer4.1.conv2.weight"])
    assert not build_network("torchvision/resnet18", 5, 32).fresh_head


def test_weights_that_cannot_be_fetched_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(url, *args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    message = r"weights of torchvision/resnet18 from https://\S+ \(OSError: no route to host\).*TEACHER_CKPT"
    with pytest.raises(UserError, match=message):
        build_network("torchvision/resnet18", 5, 32, pretrained=True)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """The hub's cache with one repository, and no network."""
    timm = pytest.importorskip("timm")
    safetensors, constants = pytest.importorskip("safetensors.torch"), pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "models--user--repo"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("abc")
    files = folder / "snapshots/abc"
    files.mkdir(parents=True)
    state = timm.create_model("resnet10t", num_classes=6).state_dict()
    safetensors.save_file(state, files / "model.safetensors")
    facts = {"input_size": [3, 96, 96], "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "crop_pct": 0.9,
             "interpolation": "bilinear", "num_classes": 6, "classifier": "fc", "first_conv": "conv1.0"}  # fmt: skip
    (files / "config.json").write_text(
        json.dumps({"architecture": "resnet10t", "num_classes": 6, "pretrained_cfg": facts})
    )
    return state


def test_a_repository_of_the_hub(repository, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", "unused")
    net = create_model("hf-hub:user/repo", pretrained=True)
    assert not net.fresh_head and all(torch.equal(value, repository[key]) for key, value in net.state_dict().items())
    assert create_model("hf-hub:user/repo", num_classes=3, pretrained=True).fresh_head
    own = native_input("hf-hub:user/repo")
    assert (own.size, own.crop, own.interpolation) == (96, 0.9, "bilinear")
    with pytest.raises(UserError, match=r"cannot load the published weights of hf-hub:user/other .*connect"):
        build_network("hf-hub:user/other", 5)


def test_models_are_made_and_listed():
    net = create_model("torchvision/shufflenet_v2_x0_5", num_classes=10, image_size=64)
    assert net(torch.rand(1, 3, 64, 64))[0].shape == (1, 10)
    assert create_model("resnet8").fc.out_features == 100
    assert list_models("torchvision/resnet1*") == [f"torchvision/resnet{n}" for n in (101, 152, 18)]
    assert "torchvision/fasterrcnn_resnet50_fpn" not in list_models("torchvision/*") and "resnet56" in list_models()
    pytest.importorskip("timm")
    assert "timm/mobilenetv4_conv_small" in list_models("timm/*mobilenet*")
    with pytest.raises(UserError, match="unknown network"):
        create_model("torchvision/nothing")


def test_an_ordered_state_of_another_network_does_not_fit(hub, monkeypatch):
    wrong = OrderedDict((key, value) for key, value in hub.items() if "layer4" not in key)
    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", lambda *a, **k: wrong)
    with pytest.raises(UserError, match="the published weights of torchvision/resnet18 do not fit: fc, layer4"):
        build_network("torchvision/resnet18", 5, 32, pretrained=True)


def test_everything_is_a_module():
    assert isinstance(create_model("torchvision/resnet18", num_classes=3, image_size=32), nn.Module)
