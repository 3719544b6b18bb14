"""What golden/models.json does not pin: the corrected faults of the mobile networks, and torchvision's weights."""

from __future__ import annotations

import urllib.request
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torchvision

from mdistiller.errors import UserError
from mdistiller.models.cifar.mobilenetv2 import mobile_half
from mdistiller.models.cifar.mv2_tinyimagenet import mobilenetv2_tinyimagenet
from mdistiller.models.cifar.ShuffleNetv1 import ShuffleV1
from mdistiller.models.cifar.ShuffleNetv2 import ShuffleV2, Stage
from mdistiller.models.imagenet import resnet
from mdistiller.models.imagenet.mobilenetv1 import MobileNetV1

MOBILE = [mobile_half, ShuffleV1, ShuffleV2, mobilenetv2_tinyimagenet]


def randomise_bn(net: nn.Module) -> None:
    """Scales and shifts that differ from channel to channel."""
    torch.manual_seed(1)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.3)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("build", MOBILE)
def test_mobile_features_have_matching_shapes(build, size):
    net = build(num_classes=7).eval()
    with torch.no_grad():
        logits, features = net(torch.randn(2, 3, size, size))
    feats, preacts, pooled = features["feats"], features["preact_feats"], features["pooled_feat"]
    assert logits.shape == (2, 7)
    assert pooled.shape == (2, {mobile_half: 1280, ShuffleV1: 960, ShuffleV2: 1024}.get(build, 1280))
    assert [f.shape for f in preacts] == [f.shape for f in feats]
    channels = [f.shape[1] for f in feats]
    assert net.get_stage_channels() == channels
    # As OFD reads them: one per stage after the stem, with a scale and a shift for each of the stage's channels.
    norms = net.get_bn_before_relu()
    assert [n.weight.shape for n in norms] == [n.bias.shape for n in norms] == [(c,) for c in channels[1:]]


@pytest.mark.parametrize(("build", "activated"), [(mobile_half, [0]), (mobilenetv2_tinyimagenet, [0, 4])])
def test_mobilenetv2_preacts(build, activated):
    net = build().eval()
    randomise_bn(net)
    with torch.no_grad():
        _, features = net(torch.randn(2, 3, 32, 32))
    for i, (feat, preact) in enumerate(zip(features["feats"], features["preact_feats"])):
        if i in activated:
            assert (preact < 0).any()
            torch.testing.assert_close(feat, preact.clamp(0, 6 if build is mobilenetv2_tinyimagenet else None))
        else:
            assert (feat < 0).any() and torch.equal(feat, preact)


def test_mobilenetv2_preact_comes_from_its_bn():
    # The last block of `mobile_half` has no skip: in training mode its BatchNorm sets the feature's mean and deviation.
    net = mobile_half().double()
    randomise_bn(net)
    _, features = net(torch.randn(16, 3, 32, 32, dtype=torch.double))
    last, bn = features["preact_feats"][-1].transpose(0, 1).flatten(1), net.get_bn_before_relu()[-1]
    torch.testing.assert_close(last.mean(1), bn.bias, rtol=0, atol=1e-9)
    # 2%: BatchNorm's eps of 1e-5 is added to a variance of about 1e-3.
    torch.testing.assert_close(last.std(1, correction=0), bn.weight, rtol=0.02, atol=0)


def test_shufflev2_feature_is_the_shuffled_relu_of_its_preact():
    net = ShuffleV2().eval()
    randomise_bn(net)
    with torch.no_grad():
        _, features = net(torch.randn(2, 3, 32, 32))
    for feat, preact in zip(features["feats"][1:], features["preact_feats"][1:]):
        half = preact.shape[1] // 2
        assert (preact[:, :half] >= 0).all() and (preact[:, half:] < 0).any()
        for c in range(half):  # two groups, interleaved
            assert torch.equal(feat[:, 2 * c], preact[:, c])
            assert torch.equal(feat[:, 2 * c + 1], preact[:, half + c].relu())


def test_shufflev2_norm_traces_each_channel_to_its_bn():
    torch.manual_seed(0)
    # In training mode, where no channel is dead.
    stage = Stage(24, 16, repeats=3).double()
    randomise_bn(stage)
    made = []  # (scale, shift, map after the ReLU) of every BatchNorm channel that has the stage's resolution
    for m in stage.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.register_forward_hook(
                lambda bn, _, out: made.extend(zip(bn.weight.tolist(), bn.bias.tolist(), out.detach().relu().unbind(1)))
            )
    _, preact = stage(torch.rand(4, 24, 16, 16, dtype=torch.double))
    norm = stage.norm()
    for c in range(16):
        behind = [(w, b) for w, b, out in made if torch.equal(out, preact[:, c].relu())]
        assert behind == [(norm.weight[c].item(), norm.bias[c].item())]


def test_mobile_half_is_initialised_as_in_its_paper():
    torch.manual_seed(0)
    net = mobile_half()
    assert net.classifier[0].weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not net.classifier[0].bias.any()
    # 3x3 on each of 480 channels: sqrt(2 / (3 * 3 * 480)) = 0.02152
    assert net.blocks[6][0].conv[3].weight.std().item() == pytest.approx(0.02152, rel=0.05)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet_equals_torchvision(name):
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name, num_classes=5)
    randomise_bn(theirs)
    ours = getattr(resnet, name)(num_classes=5)
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(2, 3, 64, 64, dtype=torch.double)
    with torch.no_grad():
        logits, features = ours.double().eval()(image)
        torch.testing.assert_close(logits, theirs.double().eval()(image), rtol=1e-12, atol=1e-12)
    channels = [f.shape[1] for f in features["feats"]]
    assert channels[1:] == ours.get_stage_channels()
    assert channels[2:] == [bn.num_features for bn in ours.get_bn_before_relu()]
    for feat, preact in zip(features["feats"], features["preact_feats"]):
        assert torch.equal(feat, preact.relu())


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_resnet_state_is_torchvisions(name):
    with torch.device("meta"):
        ours, theirs = getattr(resnet, name)(), torchvision.models.get_model(name)
    shapes = [{k: v.shape for k, v in net.state_dict().items()} for net in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_resnet_can_be_split_at_its_last_stage():
    net = resnet.resnet18(num_classes=5).eval()
    branch = net.new_last_stage().eval()
    assert {k.split(".")[0] for k in branch.state_dict()} == {"layer4"}
    assert not torch.equal(branch.layer4[0].conv1.weight, net.layer4[0].conv1.weight)
    branch.layer4.load_state_dict(net.layer4.state_dict())
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        feats, _ = net.forward_trunk(image)
        _, _, pooled = net.forward_last(branch, feats[-1])
        assert torch.equal(net.get_classifier()(pooled), net(image)[0])


def test_zero_init_residual():
    net = resnet.resnet18(zero_init_residual=True)
    assert not net.layer1[0].bn2.weight.any() and net.layer1[0].bn1.weight.all()


@pytest.fixture
def weight_file(tmp_path, monkeypatch) -> Path:
    """The path of resnet18's weights in a torch hub cache, which is still empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder / "resnet18-f37072fd.pth"


def test_pretrained_loads_from_the_hub_cache(weight_file):
    torch.manual_seed(0)
    published = resnet.resnet18().state_dict()
    torch.save(published, weight_file)
    loaded = resnet.resnet18(pretrained=True).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in published.items())


def test_pretrained_without_network_says_where_the_file_belongs(weight_file, monkeypatch):
    # Every request goes to a proxy on a port where nothing listens.
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)
    with pytest.raises(UserError) as error:
        resnet.resnet18(pretrained=True)
    message = str(error.value)
    assert "could not fetch https://download.pytorch.org/models/resnet18-f37072fd.pth" in message
    assert message.endswith(f"put the file at {weight_file}") and "\n" not in message


def test_pretrained_damaged_file(weight_file):
    weight_file.write_bytes(b"half a download")
    with pytest.raises(UserError, match="cannot be read as weights; delete it"):
        resnet.resnet18(pretrained=True)


def test_pretrained_file_that_is_an_archive_is_not_unpacked(weight_file):
    """torch.hub would write the one member of a zip into its cache."""
    with zipfile.ZipFile(weight_file, "w") as archive:
        archive.writestr("resnet34-b627a593.pth", b"another network's weights")
    with pytest.raises(UserError, match="cannot be read as weights; delete it"):
        resnet.resnet18(pretrained=True)
    assert list(weight_file.parent.iterdir()) == [weight_file]


def test_pretrained_foreign_file(weight_file):
    torch.save({"fc.weight": torch.zeros(1000, 512)}, weight_file)
    with pytest.raises(UserError, match="does not hold the weights of resnet18"):
        resnet.resnet18(pretrained=True)


def test_pretrained_has_1000_classes():
    with pytest.raises(UserError, match="1000 classes, not 10"):
        resnet.resnet18(pretrained=True, num_classes=10)


def test_mobilenetv1_has_no_published_weights():
    with pytest.raises(UserError, match="MobileNetV1 has no published torchvision weights"):
        MobileNetV1(pretrained=True)


def test_mobilenetv1_features():
    net = MobileNetV1(num_classes=5).eval()
    randomise_bn(net)
    with torch.no_grad():
        logits, features = net(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 5) and features["pooled_feat"].shape == (2, 1024)
    assert [f.shape[1] for f in features["feats"]] == net.get_stage_channels()
    assert [bn.num_features for bn in net.get_bn_before_relu()] == net.get_stage_channels()
    for feat, preact in zip(features["feats"], features["preact_feats"]):
        assert torch.equal(feat, preact.relu())
