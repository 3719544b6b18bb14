"""Probing, pairing and refusing feature maps; the regressor; alignment."""

import itertools

import pytest
import torch
import torch.nn as nn
from yacs.config import CfgNode as CN

from mdistiller.distillers import _common, distiller_dict, method_defaults
from mdistiller.distillers._feature_maps import (
    ConvReg,
    MapPairs,
    ResizedReg,
    align,
    get_feat_shapes,
    input_size,
    pair_stages,
    probe,
    probe_pair,
    regressor,
)
from mdistiller.models import cifar_model_dict, imagenet_model_dict


def net(name):
    return cifar_model_dict[name][0](num_classes=10)


def test_a_probe_does_not_change_the_network():
    model = net("resnet8").train()
    model.bn1.eval()  # a submodule's mode is kept
    state = {k: v.clone() for k, v in model.state_dict().items()}
    logits, features = probe(model, (32, 32))
    assert logits.shape == (1, 10) and not logits.requires_grad and len(features["feats"]) == 4
    assert all(v.equal(state[k]) for k, v in model.state_dict().items())
    assert model.training and model.layer1.training and not model.bn1.training


def test_shapes_of_both_networks():
    shapes_s, shapes_t = get_feat_shapes(net("resnet8"), net("resnet8x4").double(), (16, 32))
    assert shapes_s == [(1, 16, 16, 32), (1, 16, 16, 32), (1, 32, 8, 16), (1, 64, 4, 8)]
    assert [s[1] for s in shapes_t] == [32, 64, 128, 256]


class Large(nn.Module):
    """Accepts images of 64x64 and larger."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 40)

    def forward(self, x):
        return x, {"feats": [self.conv(x)]}


def test_both_networks_are_probed_with_an_image_of_the_size_that_is_asked_for():
    features_s, _ = probe_pair(Large(), Large(), 64)
    assert features_s["feats"][0].shape == (1, 2, 25, 25)
    assert probe_pair(Large(), net("resnet8"), (64, 48))[1]["feats"][0].shape == (1, 16, 64, 48)
    with pytest.raises(ValueError, match=r"the student Large cannot take an image of 32x32: .*[Kk]ernel"):
        probe_pair(Large(), net("resnet8"), 32)


def test_a_network_without_features_is_refused():
    plain = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"the teacher Sequential must return \(logits, features by name\)"):
        probe_pair(net("resnet8"), plain, 1)


@pytest.mark.parametrize(
    "counts, first, pairs",
    [
        ((4, 4), 1, [(1, 1), (2, 2), (3, 3)]),  # without both stems
        ((4, 5), 1, [(0, 1), (1, 2), (2, 3), (3, 4)]),  # the student's stem, or a student that lists none
        ((5, 4), 1, [(2, 1), (3, 2), (4, 3)]),
        ((5, 4), 0, [(1, 0), (2, 1), (3, 2), (4, 3)]),  # a teacher that lists no stem
        ((2, 5), 1, [(0, 3), (1, 4)]),
        ((4, 1), 1, []),
    ],
)
def test_the_teachers_stages_are_paired_from_the_deepest_up(counts, first, pairs):
    assert pair_stages(*counts, first) == pairs


def features(*shapes):
    return {"feats": [torch.zeros(1, *shape) for shape in shapes]}


MAPS = [(4, 8, 8), (4, 8, 8), (8, 4, 4)]


def map_pairs(maps_s=MAPS, maps_t=MAPS, pairs=(), **options):
    cfg = CN({"DISTILLER": CN({"PAIRS": list(pairs)})})
    return MapPairs(nn.Identity(), nn.Identity(), (features(*maps_s), features(*maps_t)), cfg, "AT", **options)


def test_pairs_of_maps():
    pairs = map_pairs(maps_t=[*MAPS, (16, 2, 2)])
    assert pairs.indices == [(0, 1), (1, 2), (2, 3)]
    assert pairs.shapes[1:] == [((1, 4, 8, 8), (1, 8, 4, 4)), ((1, 8, 4, 4), (1, 16, 2, 2))]
    student, teacher = {"feats": ["stem", "a", "b"]}, {"feats": ["stem", "A", "B", "C"]}
    assert pairs(student, teacher) == (["stem", "a", "b"], ["A", "B", "C"])


def test_pairs_named_in_the_configuration():
    assert map_pairs(pairs=[[0, 0], [-1, 1], [2, 2]]).indices == [(0, 0), (2, 1), (2, 2)]


@pytest.mark.parametrize(
    "pairs, message",
    [
        ([[1, 3]], r"names map 3 of the teacher, which has maps 0 to 2"),
        ([[-4, 1]], r"names map -4 of the student"),
        ([[1]], r"must list \[student's map, teacher's map\].* not \[\[1\]\]"),
        ([1, 2], r"must list"),
        ([[1.0, 2]], r"must list"),
        ([[2, 2], [1, 1]], r"must go from shallow to deep"),
        ([[1, 1], [1, 1]], r"must go from shallow to deep"),
    ],
)
def test_pairs_that_cannot_be(pairs, message):
    with pytest.raises(ValueError, match=message):
        map_pairs(pairs=pairs)


class Asserting(nn.Linear):
    def forward(self, x):
        torch._assert(x.shape[-1] == 224, "Wrong image height!")


def test_a_network_that_asserts_its_image_size_is_named():
    with pytest.raises(ValueError, match="the teacher Asserting cannot take an image of 32x32: Wrong image height!"):
        probe_pair(net("resnet8"), Asserting(3, 2), 32)


def test_maps_that_cannot_be_paired_are_refused():
    with pytest.raises(ValueError, match=r"AT compares .* student's \(1, 8, 4, 4\), the teacher's \(1, 8\)"):
        map_pairs(maps_t=[*MAPS[:2], (8,)])
    with pytest.raises(ValueError, match=r"AT needs 3 or more pairs .* student's 3 maps and the teacher's 3, 2 can be"):
        map_pairs(least=3)
    with pytest.raises(ValueError, match="Identity returns no 'preact_feats'"):
        map_pairs(kinds=("feats", "preact_feats"))


def test_the_deepest_pairs_can_be_kept():
    pairs = map_pairs()
    pairs.keep_deepest(1, "SP", "")
    assert pairs.indices == [(2, 2)] and pairs.shapes == [((1, 8, 4, 4), (1, 8, 4, 4))]
    with pytest.raises(ValueError, match=r"OFD cannot compare the pairs \[\(1, 1\), \(2, 2\)\] .*: one BatchNorm"):
        map_pairs(pairs=[[1, 1], [2, 2]]).keep_deepest(1, "OFD", "one BatchNorm")


def test_mobilenet_v1_pairs_with_resnet50_stage_by_stage():
    student, teacher = (imagenet_model_dict[name]() for name in ("MobileNetV1", "ResNet50"))
    pairs = MapPairs(student, teacher, probe_pair(student, teacher, 224), CN(), "AT")
    assert [(s[1], t[1]) for s, t in pairs.shapes] == [(128, 256), (256, 512), (512, 1024), (1024, 2048)]
    assert all(s[2:] == t[2:] for s, t in pairs.shapes)


CIFAR = ["resnet56", "resnet32x4", "ResNet50", "wrn_40_2", "vgg13", "MobileNetV2", "ShuffleV1", "ShuffleV2", "resnet8"]


class Recorded(nn.Module):
    """What a network returned for two images, returned again: so that 81 pairs take seconds."""

    def __init__(self, network):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        with torch.no_grad():
            self.logits, self.features = network.eval()(torch.randn(2, 3, 32, 32))
        self.get_bn_before_relu = network.get_bn_before_relu

    def forward(self, image):
        count = len(image)
        lists = {name: [f[:count] for f in self.features[name]] for name in ("feats", "preact_feats")}
        return self.logits[:count], {**lists, "pooled_feat": self.features["pooled_feat"][:count]}


@pytest.fixture(scope="module")
def recorded():
    return {name: Recorded(net(name)) for name in CIFAR}


@pytest.mark.parametrize("method", ["AT", "NST", "VID", "KDSVD", "OFD", "REVIEWKD", "SP", "FITNET"])
def test_every_pair_of_cifar_networks_can_be_compared(method, recorded):
    """Nine families in every combination: from three to four stages, maps of 2x2 to 32x32."""
    cfg = CN({section: defaults.clone() for section, defaults in method_defaults.items()})
    cfg.REVIEWKD.MAX_MID_CHANNEL = 8  # the default takes minutes
    for student, teacher in itertools.product(CIFAR, repeat=2):
        distiller = distiller_dict[method](recorded[student], recorded[teacher], cfg, image_size=32).train()
        with torch.no_grad():
            losses = distiller.forward_train(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]), epoch=1)[1]
        assert all(loss.isfinite() for loss in losses.values()), (student, teacher)


INPUT_SIZE = "FITNET.INPUT_SIZE"


def test_the_size_of_the_probing_image():
    cfg = CN({"DATASET": CN({"TYPE": "tiny_imagenet"})})
    for configured in ([], [32, 32], [64, 64]):
        assert input_size(configured, 64, cfg, INPUT_SIZE) == 64  # the run's; the original's default is ignored
    assert input_size([], None, cfg, INPUT_SIZE) == 64  # by hand: the data set's
    assert input_size([48, 40], None, cfg, INPUT_SIZE) == (48, 40)
    with pytest.raises(ValueError, match=r"FITNET.INPUT_SIZE is \[48, 48\], but the images are 64x64"):
        input_size([48, 48], 64, cfg, INPUT_SIZE)
    for wrong in ([32], [32, 32, 3], [32, -1], [32, 1.5]):
        with pytest.raises(ValueError, match=r"FITNET.INPUT_SIZE must be \[\] or \[height, width\], not"):
            input_size(wrong, 32, cfg, INPUT_SIZE)


@pytest.mark.parametrize(
    "size_s, size_t", [((8, 8), (4, 4)), ((4, 4), (8, 8)), ((8, 8), (8, 8)), ((7, 6), (5, 6)), ((9, 5), (2, 2))]
)
@pytest.mark.parametrize("use_relu", [True, False])
def test_regressor_returns_the_teachers_shape(size_s, size_t, use_relu):
    own = ConvReg((2, 3, *size_s), (2, 5, *size_t), use_relu)
    out = own(torch.randn(2, 3, *size_s))
    assert out.shape == (2, 5, *size_t)
    assert out.ge(0).all() == use_relu
    assert {k.split(".")[0] for k in own.state_dict()} == {"conv", "bn"}


def test_no_regressor_to_a_larger_map():
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 4\) to a teacher map of \(1, 3, 7, 7\)"):
        ConvReg((1, 3, 4, 4), (1, 3, 7, 7))


@pytest.mark.parametrize("size_s, size_t", [((8, 8), (4, 4)), ((4, 4), (8, 8)), ((8, 8), (8, 8)), ((8, 8), (2, 2))])
def test_sizes_of_the_originals_networks_keep_the_originals_regressor(size_s, size_t):
    assert type(regressor((1, 3, *size_s), (1, 5, *size_t))) is ConvReg


@pytest.mark.parametrize(
    "size_s, size_t", [((4, 4), (7, 7)), ((56, 56), (14, 14)), ((5, 9), (9, 5)), ((8, 6), (4, 4)), ((1, 1), (16, 16))]
)
def test_other_sizes_are_resized(size_s, size_t):
    own = regressor((2, 3, *size_s), (2, 5, *size_t)).train()
    assert type(own) is ResizedReg and own.conv.weight.shape == (5, 3, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        low = own(torch.randn(2, 3, *size_s))
    low.float().sum().backward()
    assert low.shape == (2, 5, *size_t)
    assert {k.split(".")[0] for k in own.state_dict()} == {"conv", "bn"}


def test_a_resized_map_is_the_pooled_or_interpolated_one():
    own = ResizedReg((1, 1, 4, 4), (1, 1, 2, 2), use_relu=False).eval()
    nn.init.ones_(own.conv.weight), nn.init.zeros_(own.conv.bias)
    own.bn.eps = 0.0
    assert own(torch.arange(16.0).reshape(1, 1, 4, 4)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    own.size = (1, 4)
    assert own(torch.tensor([[[[0.0, 4.0]]]])).flatten().tolist() == [0.0, 1.0, 3.0, 4.0]


def test_align_pools_the_larger():
    a, b = torch.arange(16.0).reshape(1, 1, 4, 4), torch.zeros(1, 2, 2, 2)
    for first, second in ((a, b), (b, a)):
        pooled = align(first, second)
        assert pooled[0].shape[2:] == pooled[1].shape[2:] == (2, 2)
    assert align(a, b)[0].flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert align(a, a)[0] is a
    tall, wide = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 2, 4)
    assert [x.shape[2:] for x in align(tall, wide)] == [(2, 2), (2, 2)]


def test_the_originals_import_path_is_kept():
    assert _common.get_feat_shapes is get_feat_shapes and _common.ConvReg is ConvReg
