"""Networks of other libraries: which maps are found, and that wrapping changes nothing about the network itself."""

import copy
import io
import pickle
import weakref
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch.nn as nn
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from mdistiller.distributed.sync_batchnorm import HostSyncBatchNorm2d, synchronize_batchnorm
from mdistiller.engine.graph.host_state import Watch, changed, host_state
from mdistiller.engine.teacher.fold_batchnorm import fold_batchnorm
from mdistiller.engine.teacher.original import Original
from mdistiller.errors import UserError
from mdistiller.models.copies import copy_without_hooks, has_hooks
from mdistiller.models.held import Held
from mdistiller.models.sources import build_network
from mdistiller.models.wrapped import WrappedNetwork, wrap

PRETRAINED = Path(__file__).parents[3] / "shared/data/pretrained"
CLASSES = 10


class Small(nn.Module):
    """A stem, two stages of residual blocks with in-place ReLUs, a classifier behind a Dropout."""

    def __init__(self, num_classes=CLASSES):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.stage1 = nn.Sequential(Block(4, 6, 2), Block(6, 6, 1))
        self.stage2 = nn.Sequential(Block(6, 8, 2), Block(8, 8, 1))
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.stage2(self.stage1(self.relu(self.bn(self.conv(x)))))
        return self.fc(self.drop(x.mean((2, 3))))


class Block(nn.Module):
    def __init__(self, width, out, stride):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(width, out, 3, stride, 1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)
        self.skip = nn.Conv2d(width, out, 1, stride)

    def forward(self, x):
        out = self.bn(self.conv(x))
        out += self.skip(x)
        return self.relu(out)


def small(**kwargs):
    torch.manual_seed(0)
    return wrap(Small(), CLASSES, 32, **kwargs)


def images(size=32, count=2):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def tensors(output):
    logits, features = output
    return [logits, *features["feats"], *features["preact_feats"], features["pooled_feat"]]


def assert_same(one, other):
    for own, wanted in zip(tensors(one), tensors(other), strict=True):
        assert torch.equal(own, wanted)


def test_each_size_gives_its_last_map_before_and_after_the_activation():
    net = small().eval()
    assert net.feat_names == ["relu", "stage1", "stage2"] and net.stem_in_feats and net.classifier_width == 8
    x, bare = images(), net.bare
    logits, features = net(x)
    stem = bare.bn(bare.conv(x))
    block = bare.stage2[1]
    before = bare.stage2[0](bare.stage1(stem.relu()))
    preact = block.bn(block.conv(before)) + block.skip(before)
    assert torch.equal(features["preact_feats"][0], stem) and torch.equal(features["feats"][0], stem.relu())
    assert torch.equal(features["preact_feats"][2], preact) and torch.equal(features["feats"][2], preact.relu())
    assert torch.equal(features["pooled_feat"], preact.relu().mean((2, 3)))
    assert torch.equal(logits, bare.fc(features["pooled_feat"]))
    wanted = [bare.bn, bare.stage1[1].bn, block.bn]
    assert all(bn is own for bn, own in zip(net.get_bn_before_relu(), wanted, strict=True))


# Network -> image size, maps (channels, height) expected, the stem among them, classifier's width.
FOUND = {
    "torchvision/resnet18": (64, [(64, 32), (64, 16), (128, 8), (256, 4), (512, 2)], True, 512),
    "torchvision/mobilenet_v3_small": (64, [(16, 32), (16, 16), (24, 8), (48, 4), (576, 2)], True, 1024),
    "torchvision/vit_b_16": (32, [(768, 2)] * 4, False, 768),
    "torchvision/convnext_tiny": (64, [(96, 16), (192, 8), (384, 4), (768, 2)], False, 768),
    "torchvision/swin_t": (64, [(96, 16), (192, 8), (384, 4), (768, 2)], False, 768),
    "torchvision/densenet121": (64, [(64, 32), (256, 16), (512, 8), (1024, 4), (1024, 2)], True, 1024),
    "torchvision/vgg11_bn": (64, [(64, 64), (128, 32), (256, 16), (512, 8), (512, 4), (512, 2)], True, 4096),
    "torchvision/efficientnet_b0": (64, [(16, 32), (24, 16), (40, 8), (112, 4), (1280, 2)], False, 1280),
    "torchvision/shufflenet_v2_x0_5": (64, [(24, 32), (24, 16), (48, 8), (96, 4), (1024, 2)], True, 1024),
    "torchvision/regnet_y_400mf": (64, [(32, 32), (48, 16), (104, 8), (208, 4), (440, 2)], True, 440),
    "torchvision/squeezenet1_1": (64, [(64, 31), (128, 15), (256, 7), (512, 3)], True, 512),
    "torchvision/alexnet": (64, [(64, 15), (192, 7), (256, 3), (256, 1)], True, 4096),
    "timm/resnet18": (32, [(64, 16), (64, 8), (128, 4), (256, 2), (512, 1)], True, 512),
    "timm/efficientnet_lite0": (64, [(16, 32), (24, 16), (40, 8), (112, 4), (320, 2)], True, 1280),
    "timm/vit_tiny_patch16_224": (32, [(192, 2)] * 4, False, 192),
    "timm/convnext_atto": (64, [(40, 16), (80, 8), (160, 4), (320, 2)], False, 320),
    "timm/mobilenetv4_conv_small": (64, [(32, 32), (32, 16), (64, 8), (96, 4), (960, 2)], True, 1280),
    "timm/swin_tiny_patch4_window7_224": (64, [(96, 16), (192, 8), (384, 4), (768, 2)], False, 768),
    "timm/mixer_s16_224": (32, [(512, 2)] * 4, False, 512),
    "timm/deit_tiny_distilled_patch16_224": (32, [(192, 2)] * 4, False, 192),
    "timm/levit_128s": (64, [(128, 4), (256, 2), (384, 1)], False, 384),
}
LARGE = ("vit_b_16", "vgg11_bn", "alexnet", "swin", "convnext_tiny", "densenet121", "regnet", "mixer")


def named(cases):
    return [pytest.param(c, marks=pytest.mark.slow if any(n in c for n in LARGE) else ()) for c in cases]


def built(name, size, **kwargs):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    return build_network(name, CLASSES, size, **kwargs)


@pytest.mark.parametrize("name", named(FOUND))
def test_maps_are_found(name):
    size, expected, stem, width = FOUND[name]
    net = built(name, size).eval()
    x = images(size)
    with torch.no_grad():
        logits, features = net(x)
        assert torch.equal(logits, net.bare(x))
    assert [(m.shape[1], m.shape[2]) for m in features["feats"]] == expected
    assert [m.shape for m in features["feats"]] == [m.shape for m in features["preact_feats"]]
    assert features["pooled_feat"].shape == (2, width) and net.classifier_width == width
    assert net.stem_in_feats is stem and net.name == name
    assert not any(getattr(layer, "inplace", False) for layer in net.bare.modules())
    state = net.state_dict()
    net.bare.load_state_dict(state, strict=True)


@pytest.mark.parametrize("name", ["timm/resnet18", "timm/convnext_atto", "timm/mobilenetv4_conv_small"])
def test_the_maps_are_those_that_timm_returns(name):
    net, x = built(name, 64).eval(), images(64)
    with torch.no_grad():
        own, timms = net(x)[1]["feats"], net.bare.forward_intermediates(x, intermediates_only=True)
        pooled = net.bare.forward_head(net.bare.forward_features(x), pre_logits=True)
    assert all(torch.equal(one, other) for one, other in zip(own, timms, strict=True))
    assert torch.equal(net(x)[1]["pooled_feat"], pooled)


def test_tokens_are_folded_without_the_class_token_and_evenly_spaced():
    net, x = built("timm/vit_tiny_patch16_224", 64).eval(), images(64)
    assert net.feat_names == [f"blocks.{i}" for i in (2, 5, 8, 11)]
    with torch.no_grad():
        maps = net.bare.forward_intermediates(x, indices=[2, 5, 8, 11], intermediates_only=True)
        assert all(torch.equal(one, other) for one, other in zip(net(x)[1]["feats"], maps, strict=True))


@pytest.mark.parametrize("nested", [False, True])
def test_the_state_dict_is_the_bare_networks(nested):
    net, other = small(), Small()
    holder = nn.ModuleDict({"student": net}) if nested else net
    prefix = "student." if nested else ""
    state = holder.state_dict()
    assert list(state) == [prefix + key for key in other.state_dict()]
    stripped = {key.removeprefix(prefix): value for key, value in state.items()}
    other.load_state_dict(stripped, strict=True)
    twin = wrap(Small(), CLASSES, 32)
    target = nn.ModuleDict({"student": twin}) if nested else twin
    target.load_state_dict(state, strict=True)
    assert_same(twin.eval()(images()), net.eval()(images()))
    del state[f"{prefix}fc.bias"]
    with pytest.raises(RuntimeError, match=rf'Missing key.*"{prefix}fc\.bias"'):
        target.load_state_dict(state)
    kept = target.load_state_dict({**state, f"{prefix}odd": torch.zeros(1)}, strict=False)
    assert kept.unexpected_keys == [f"{prefix}odd"]


def test_versions_are_those_of_the_bare_network():
    net = small()
    assert net.state_dict()._metadata == net.bare.state_dict()._metadata
    own = nn.ModuleDict({"student": net}).state_dict()._metadata
    assert own["student.bn"] == {"version": 2}


@pytest.mark.parametrize("copied", [copy.deepcopy, copy_without_hooks, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_capture_their_own_maps(copied):
    net = small().eval()
    twin = copied(net)
    assert_same(twin(images()), net(images()))
    with torch.no_grad():
        twin.bare.conv.weight.zero_()
    assert not torch.equal(twin(images())[1]["feats"][0], net(images())[1]["feats"][0])
    assert torch.equal(tensors(twin(images()))[1], twin.bare.relu(twin.bare.bn(twin.bare.conv(images()))))


def test_nothing_is_kept_after_a_forward():
    net = small()
    kept = [weakref.ref(tensor) for tensor in tensors(net(images()))]
    assert not any(ref() is not None for ref in kept)
    net.bare(images())
    assert net._taps.store.captured is None
    with pytest.raises(RuntimeError):
        net(torch.zeros(1, 5, 8, 8))
    assert net._taps.store.captured is None
    first, second = net.eval()(images()), net(images() + 1)
    assert_same(first, net(images()))
    assert not torch.equal(first[0], second[0])


def test_probing_changes_nothing():
    torch.manual_seed(0)
    bare = Small()
    bare.bn.eval()
    state, random = copy.deepcopy(bare.state_dict()), torch.get_rng_state()
    modes = [layer.training for layer in bare.modules()]
    net = wrap(bare, CLASSES, 32)
    assert torch.equal(random, torch.get_rng_state()) and [layer.training for layer in bare.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in bare.state_dict().items()) and net.training


def test_taps_are_not_hooks_of_others():
    net = small().eval()
    held, watch, original = Held(net), Watch(net), Original(net)
    assert not has_hooks(net) and not held.hooked() and not watch.hooks()
    before = host_state(net)
    net(images())
    assert not changed(before, host_state(net))
    assert not original.change(thoroughly=True)
    handle = net.bare.stage1.register_forward_hook(lambda *_: None)
    assert has_hooks(net) and held.hooked() and watch.hooks()
    handle.remove()
    assert not held.hooked()
    net.bare.drop.register_forward_hook(lambda *_: None)
    assert held.hooked()


class Writes(nn.Module):
    """It writes into its own map after the layer that computes it; or relies on an in-place ReLU."""

    def __init__(self, relies):
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(3, 4, 3, 2), nn.ReLU(inplace=True), nn.Linear(4, CLASSES)
        self.relies = relies

    def forward(self, x):
        x = self.conv(x)
        if self.relies:
            self.relu(x)
        else:
            x = F.relu(x, inplace=True)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("relies", [False, True])
def test_a_map_that_is_overwritten_is_copied(relies):
    bare = Writes(relies).eval()
    x = images()
    logits = bare(x)
    net = wrap(bare, CLASSES, 32)
    assert torch.equal(net(x)[0], logits)
    assert net(x)[1]["preact_feats"][0].min() < 0
    if not relies:
        assert torch.equal(net(x)[1]["feats"][0], bare.conv(x))


class Attention(nn.Module):
    """torch's own encoder, whose fast path is left where there are hooks; tokens of 4x4 patches and a class token."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 8, 8)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 6, enable_nested_tensor=False
        )
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.encoder(torch.cat([self.token.expand(len(x), -1, -1), x], 1))[:, 0])


def test_a_transformer_of_the_users_own():
    net = wrap(Attention(), CLASSES, 32).eval()
    assert net.feat_names == ["encoder.layers.0", "encoder.layers.2", "encoder.layers.3", "encoder.layers.5"]
    assert [tuple(m.shape) for m in net(images())[1]["feats"]] == [(2, 8, 4, 4)] * 4


def test_named_layers_are_the_maps():
    net = small(feats=["stage1.0", "stage2.0.bn"])
    assert net.feat_names == ["stage1.0", "stage2.0.bn"]
    assert [tuple(m.shape[1:]) for m in net(images())[1]["feats"]] == [(6, 8, 8), (8, 4, 4)]


@pytest.mark.parametrize(
    "feats, message",
    [
        (["stag1"], r"unknown layer of Small 'stag1'; did you mean stage1"),
        (["stage2", "stage1"], r"must go from shallow to deep: \['stage1', 'stage2'\]"),
        (["fc"], r"layer fc of Small returns \(2, 10\), which is no feature map"),
    ],
)
def test_wrong_layers_are_refused(feats, message):
    with pytest.raises(UserError, match=message):
        small(feats=feats)


class Sums(nn.Module):
    """Without layers."""

    def forward(self, image):
        return image.sum((2, 3)).repeat(1, 4)[:, :10]


class Auxiliary(nn.Module):
    """With a second classifier in training, as googlenet's."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.aux = nn.Conv2d(3, 4, 3), nn.Linear(4, 10), nn.Linear(4, 10)

    def forward(self, image):
        pooled = self.conv(image).mean((2, 3))
        return (self.fc(pooled), self.aux(pooled)) if self.training else self.fc(pooled)


def test_a_network_without_maps_gives_none():
    bare = nn.Sequential(nn.Flatten(), nn.Linear(3072, 6), nn.ReLU(), nn.Linear(6, 10))
    net = wrap(bare, CLASSES, 32)
    logits, features = net(images())
    assert torch.equal(logits, bare(images())) and (features["feats"], features["preact_feats"]) == ([], [])
    assert torch.equal(features["pooled_feat"], bare[:3](images())) and net.classifier_width == 6
    with pytest.raises(UserError, match="Sequential has no BatchNorm"):
        net.get_bn_before_relu()


def test_a_network_of_other_outputs_in_training_says_so():
    with pytest.raises(UserError, match=r"Auxiliary returns a tuple .* in training, and its logits alone in eval"):
        wrap(Auxiliary(), CLASSES, 32).train()(images())


@pytest.mark.parametrize("compiled", [lambda net: torch.compile(net, backend="eager"), lambda net: net])
def test_a_compiled_network_is_refused(compiled):
    """Within a probe's hooks, torch.compile would go on for hours."""
    net = Auxiliary().eval()
    module = compiled(net)
    if module is net:
        net.conv.compile(backend="eager")
    with pytest.raises(UserError, match=r"is compiled .* give the network as it was"):
        wrap(module, CLASSES, 32)


def test_layers_of_a_network_that_returns_its_features_are_refused():
    from .._networks import Net

    with pytest.raises(UserError, match=r"Net returns its features itself; name no layers \['conv'\]"):
        wrap(Net(), 3, 32, feats=["conv"])


@pytest.mark.parametrize(
    "module, message",
    [
        (nn.Conv2d(3, 4, 3), r"Conv2d returns a tensor \(2, 4, 30, 30\) for 2 images; it must return logits"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3072, 7)), "logits of 7 classes, not of 10"),
        (Sums(), "neither a layer that returns a feature map .* nor a classifier"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 10)), "it takes 64x64: resize the images"),
    ],
)
def test_modules_that_cannot_be_wrapped_are_refused(module, message):
    with pytest.raises(UserError, match=message):
        wrap(module, CLASSES, 32)


def test_a_network_of_our_form_comes_back_unchanged():
    from .._networks import Net

    net = Net()
    assert wrap(net, 3, 32) is net
    assert wrap(small(), CLASSES, 32).__class__ is WrappedNetwork


def test_a_network_without_batchnorm_before_the_relu_says_so():
    net = wrap(Writes(False), CLASSES, 32)
    with pytest.raises(UserError, match="Writes has no BatchNorm before a ReLU"):
        net.get_bn_before_relu()


def test_the_folded_teacher_returns_the_same():
    net = small().eval().requires_grad_(False)
    folded = fold_batchnorm(net, images(count=1), ["feats[1]", "preact_feats[2]", "pooled_feat"])
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    (logits, own), (wanted, features) = folded(images()), net(images())
    torch.testing.assert_close(logits, wanted)
    torch.testing.assert_close(own["feats"][1], features["feats"][1])
    torch.testing.assert_close(own["preact_feats"][2], features["preact_feats"][2])


def test_torch_compile_makes_one_graph():
    torch._dynamo.reset()
    net, counter = small(), CompileCounterWithBackend("eager")
    compiled = torch.compile(net.eval(), fullgraph=True, backend=counter)
    for _ in range(2):
        assert_same(compiled(images()), net(images()))
    assert counter.frame_count == 1
    logits, features = compiled(images())
    (logits.sum() + sum(m.mean() for m in features["preact_feats"])).backward()
    assert all(p.grad is not None for p in net.parameters())
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["timm/mobilenetv4_conv_small", "torchvision/densenet121"])
def test_synchronised_batchnorms_keep_taps_and_activations(name):
    """timm's BatchNorms hold their activation; densenet's last map is a BatchNorm's output."""
    net = built(name, 32).eval()
    before = net(images())
    count = sum(isinstance(layer, nn.BatchNorm2d) for layer in net.modules())
    synced = synchronize_batchnorm(net, torch.device("cpu"))
    assert sum(isinstance(layer, HostSyncBatchNorm2d) for layer in synced.modules()) == count
    for own, wanted in zip(tensors(synced(images())), tensors(before), strict=True):
        torch.testing.assert_close(own, wanted)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_traced_program_returns_the_logits():
    net = small().eval()
    traced = torch.jit.trace(net, images())
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(images()), net(images())[0])


@pytest.mark.parametrize("name, size", [("tf_efficientnet_lite0", 224), ("tf_efficientnet_lite2", 260)])
def test_real_weights(name, size):
    file = PRETRAINED / f"{name}.safetensors"
    if not file.is_file():
        pytest.skip(f"needs {file}")
    timm, safetensors = pytest.importorskip("timm"), pytest.importorskip("safetensors.torch")
    state = safetensors.load_file(file)
    bare = timm.create_model(name).eval()
    net = build_network(f"timm/{name}", 1000).eval()
    bare.load_state_dict(state)
    net.load_state_dict(state, strict=True)
    x = images(size, count=1)
    with torch.no_grad():
        assert torch.equal(net(x)[0], bare(x))
