"""Probing, pairing and refusing feature maps; the regressor; alignment."""

import pytest
import torch
import torch.nn as nn

from mdistiller.distillers import _common
from mdistiller.distillers._feature_maps import (
    ConvReg,
    align,
    get_feat_shapes,
    get_stage_shapes,
    pair_stages,
    probe,
    require_maps,
    require_paired_maps,
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


def test_the_smallest_image_that_both_accept():
    assert get_stage_shapes(net("resnet8"), net("resnet8"))[0][0] == (1, 16, 32, 32)
    assert get_stage_shapes(Large(), Large())[0] == [(1, 2, 25, 25)]


def test_stages_are_paired_without_the_stem():
    assert pair_stages([0, 1, 2], "abc") == [(1, "b"), (2, "c")]
    assert pair_stages([1, 2], "abc") == [(1, "b"), (2, "c")]  # the first network lists no stem
    assert pair_stages([0, 1, 2], "bc") == [(1, "b"), (2, "c")]


def test_mobilenet_v1_pairs_with_resnet50_stage_by_stage():
    nets = (imagenet_model_dict[name]() for name in ("MobileNetV1", "ResNet50"))
    shapes = get_stage_shapes(*nets)
    require_paired_maps(*shapes, "AT")
    pairs = pair_stages(*shapes)
    assert [(s[1], t[1]) for s, t in pairs] == [(128, 256), (256, 512), (512, 1024), (1024, 2048)]
    assert all(s[2:] == t[2:] for s, t in pairs)


def test_maps_that_cannot_be_paired_are_refused():
    maps = [(1, 4, 8, 8), (1, 4, 8, 8), (1, 8, 4, 4)]
    require_paired_maps(maps, [(1, 2, 8, 8), (1, 5, 6, 6), (1, 3, 4, 4)], "AT")
    with pytest.raises(ValueError, match=r"AT pairs .* student: .*\(1, 8, 4, 4\); teacher: .*\(1, 8, 2, 2\)"):
        require_paired_maps(maps, [*maps, (1, 8, 2, 2)], "AT")
    with pytest.raises(ValueError, match="AT pairs"):
        require_paired_maps(maps, maps[2:], "AT")
    with pytest.raises(ValueError, match=r"AT compares .* student's \(1, 8, 4, 4\), the teacher's \(1, 8\)"):
        require_paired_maps(maps, [*maps[:2], (1, 8)], "AT")
    with pytest.raises(ValueError, match=r"KDSVD needs .* student's \(1, 4, 8, 8\), the teacher's \(1, 5, 6, 6\)"):
        require_maps([((1, 4, 8, 8), (1, 5, 6, 6))], "KDSVD", same_size=True)


@pytest.mark.parametrize(
    "size_s, size_t", [((8, 8), (4, 4)), ((4, 4), (8, 8)), ((8, 8), (8, 8)), ((7, 6), (5, 6)), ((9, 5), (2, 2))]
)
@pytest.mark.parametrize("use_relu", [True, False])
def test_regressor_returns_the_teachers_shape(size_s, size_t, use_relu):
    regressor = ConvReg((2, 3, *size_s), (2, 5, *size_t), use_relu)
    out = regressor(torch.randn(2, 3, *size_s))
    assert out.shape == (2, 5, *size_t)
    assert out.ge(0).all() == use_relu
    assert {k.split(".")[0] for k in regressor.state_dict()} == {"conv", "bn"}


def test_no_regressor_to_a_larger_map():
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 4\) to a teacher map of \(1, 3, 7, 7\)"):
        ConvReg((1, 3, 4, 4), (1, 3, 7, 7))


def test_align_pools_the_larger():
    a, b = torch.arange(16.0).reshape(1, 1, 4, 4), torch.zeros(1, 2, 2, 2)
    for first, second in ((a, b), (b, a)):
        pooled = align(first, second)
        assert pooled[0].shape[2:] == pooled[1].shape[2:] == (2, 2)
    assert align(a, b)[0].flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert align(a, a)[0] is a


def test_the_originals_import_path_is_kept():
    assert _common.get_feat_shapes is get_feat_shapes and _common.ConvReg is ConvReg
