"""Every method with networks of other libraries, as teacher and as student: it trains, or is refused in one line."""

import pytest
import torch.nn as nn
import torch.nn.functional as F

from mdistiller.distillers import distiller_dict
from mdistiller.errors import UserError

from ..test_docs_networks import refused_on_the_page
from .pairs import CLASSES, METHODS, NETWORKS, PARTNER, ROLES, batch, build, config, network, outcome, trained

# The others take a second a step.
QUICK = ("torchvision/mobilenet_v3_small", "timm/vit_tiny_patch16_224")
REFUSED = refused_on_the_page()
SMALL, TOKENS = "timm/mobilenetv4_conv_small", "timm/vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    path = tmp_path_factory.mktemp("groups") / "groups.json"
    path.write_text("[[0, 1], [2, 3]]")
    return str(path)


def marked(name):
    return pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", list(map(marked, NETWORKS)))
def test_it_trains_or_is_refused_as_the_page_says(name, role, method, groups):
    found = outcome(method, name, role, groups)
    assert bool(found.refusal) == (name in REFUSED[method][role]), found.refusal
    if found.refusal:
        assert name in found.refusal and "\n" not in found.refusal
        assert "use a ResNet" in found.refusal or "choose a network" in found.refusal
    else:
        assert all(loss == loss and abs(loss) < float("inf") for loss in found.losses.values())
        assert found.reached and not found.gap


@pytest.mark.parametrize("method", [name for name in METHODS if not name.startswith("DCGD")])
def test_neither_network_need_be_of_this_library(method, groups):
    """A network whose four maps have one size teaches one whose maps shrink from 32x32 to 2x2."""
    found = trained(method, network(SMALL), network(TOKENS), config(groups))
    assert bool(found.refusal) == (TOKENS in REFUSED[method]["teacher"] or SMALL in REFUSED[method]["student"])
    assert found.refusal or (found.reached and not found.gap)


class Resized(nn.Module):
    """A teacher that sees the images of a run at its own size, and has the attributes of its network."""

    def __init__(self, network, size):
        super().__init__()
        self.network, self.size = network, size

    def forward(self, image):
        return self.network(F.interpolate(image, (self.size, self.size), mode="bilinear", antialias=True))

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)


@pytest.mark.parametrize("method", METHODS)
def test_a_teacher_may_resize_the_images(method, groups):
    """Its maps are probed through it, with an image of the run's size."""
    taken = [name for name in (SMALL, *NETWORKS) if name not in REFUSED[method]["teacher"]]
    teacher = Resized(network((taken or [SMALL])[0]), 96)
    found = trained(method, network(PARTNER), teacher, config(groups))
    assert bool(found.refusal) == (not taken)
    assert found.refusal or (found.reached and not found.gap)
    maps = teacher(batch()["image"])[1]["feats"]
    assert [f.shape[-1] for f in maps] == [48, 24, 12, 6, 3]


@pytest.mark.parametrize("method", ["AT", "NST", "VID", "SP", "KDSVD", "REVIEWKD", "FITNET"])
def test_pairs_of_maps_are_named_for_any_network(method, groups):
    pairs = [[1, -1]] if method == "FITNET" else [[1, 0], [3, -1]]
    distiller = build(method, network(SMALL), network(TOKENS), config(groups, "DISTILLER.PAIRS", pairs))
    last = len(network(TOKENS)(batch()["image"])[1]["feats"]) - 1
    if method == "FITNET":
        assert (distiller.guided, distiller.hint) == (1, last)
    else:
        assert distiller.pairs.indices == [(1, 0), (3, last)]
    _, losses = distiller(**batch())
    assert all(loss.isfinite() for loss in losses.values())


def test_the_first_map_counts_where_it_is_no_stems(groups):
    """Of four stages without a stem all are paired; of a stem and four stages, the four."""
    own = {teacher: build("AT", network(PARTNER), network(teacher), config(groups)) for teacher in (SMALL, TOKENS)}
    assert own[TOKENS].pairs.indices == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert own[SMALL].pairs.indices == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_ofd_takes_the_stages_that_end_in_a_batchnorm_and_a_relu(groups):
    small, resnet = (build("OFD", network(PARTNER), network(own), config(groups)) for own in (SMALL, "timm/resnet18"))
    assert small.pairs.indices == [(3, 4)]
    assert resnet.pairs.indices == [(1, 2), (2, 3), (3, 4)]  # as many as resnet8 lists channels of stages
    bn = network("timm/resnet18").get_bn_before_relu()[-1]
    assert bn is network("timm/resnet18").bare.layer4[1].bn2
    assert small.margins[0].shape == (1, 960, 1, 1)


def test_only_the_batchnorms_of_ofds_teacher_train(groups):
    """Stochastic depth and dropout would make its targets random."""
    distiller = build("OFD", network(PARTNER), network(SMALL), config(groups))
    teacher = distiller.teacher
    assert teacher.training
    norms = [m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    others = [m for m in teacher.modules() if m is not teacher and not isinstance(m, nn.BatchNorm2d)]
    assert norms and all(m.training for m in norms) and not any(m.training for m in others)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    one, other = (distiller.teacher_forward(batch()["image"])[1]["preact_feats"][-1] for _ in range(2))
    assert one.equal(other)
    assert all(value.equal(before[key]) for key, value in teacher.state_dict().items())
    assert not any(m.training for m in distiller.eval().teacher.modules())


def test_ofd_names_both_networks_that_it_refuses(groups):
    line = outcome("OFD", TOKENS, "teacher", groups).refusal
    assert "student ResNet" in line and TOKENS in line and "choose" in line


@pytest.mark.parametrize("method, reads", [("OFD", False), ("AT", False), ("CRD", False), ("KD", True), ("DKD", True)])
def test_methods_that_read_only_features_take_a_teacher_of_other_classes(method, reads, groups):
    """Which methods read its logits, `teacher_outputs` says."""
    declared = distiller_dict[method].teacher_outputs
    assert ("logits" in declared) == reads
    if not reads:
        teacher = type(network(PARTNER))(8, num_classes=CLASSES + 3)
        found = trained(method, network(PARTNER), teacher, config(groups))
        assert not found.refusal and found.reached


class Vectors(nn.Module):
    """A network whose "maps" are vectors (B, D), named as those of other libraries are."""

    def __init__(self):
        super().__init__()
        self.name = "my/net.py:vectors"
        self.fc1, self.fc2 = nn.Linear(3, 8), nn.Linear(8, CLASSES)

    def forward(self, image):
        x = self.fc1(image.mean((2, 3)))
        return self.fc2(x), {"feats": [x, x, x], "preact_feats": [x, x, x], "pooled_feat": x}


@pytest.mark.parametrize("method", ["AT", "NST", "VID", "SP", "KDSVD", "REVIEWKD", "FITNET", "OFD"])
@pytest.mark.parametrize("role", ROLES)
def test_vectors_are_refused(method, role, groups):
    own, partner = Vectors(), network(PARTNER)
    networks = (partner, own) if role == "teacher" else (own, partner)
    with pytest.raises(UserError, match=r"\((4|1), 8\)|\(1, 8\)") as refusal:
        build(method, *networks, config(groups))
    line = str(refusal.value)
    assert all(part in line for part in ("my/net.py:vectors", "ResNet", "DISTILLER.PAIRS", "TEACHER_FEATS"))


class FewMaps(Vectors):
    """One map."""

    def forward(self, image):
        logits, features = super().forward(image)
        return logits, {"feats": [image], "preact_feats": [image], "pooled_feat": features["pooled_feat"]}


def test_too_few_maps_are_refused(groups):
    with pytest.raises(UserError, match=r"KDSVD needs 2 .* \(my/net.py:vectors and ResNet\); DISTILLER.PAIRS names"):
        build("KDSVD", FewMaps(), network(PARTNER), config(groups))
    with pytest.raises(UserError, match=r"HINT_LAYER is 2, .* maps 0 to 0 \(ResNet and my/net.py:vectors\); DISTILLER"):
        build("FITNET", network(PARTNER), FewMaps(), config(groups))


def test_more_directions_than_a_map_has_are_refused_when_kdsvd_is_built(groups):
    assert not trained("KDSVD", network(PARTNER), network(SMALL), config(groups, "KDSVD.K", 2)).refusal
    with pytest.raises(UserError, match=r"KDSVD\.K 3 is more than the 2 directions of the smallest map"):
        build("KDSVD", network(PARTNER), network(SMALL), config(groups, "KDSVD.K", 3))


def test_dcgd_groups_no_network_of_another_library(groups):
    line = outcome("DCGD", TOKENS, "student", groups).refusal
    assert TOKENS in line and "resnet20" in line and "any network can be the teacher" in line


class OnePosition(nn.Module):
    """Two maps of 1x1."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 1), nn.Linear(8, CLASSES)

    def forward(self, image):
        x = self.conv(image.mean((2, 3), keepdim=True))
        return self.fc(x.flatten(1)), {"feats": [x, x, x], "preact_feats": [x, x, x], "pooled_feat": x.flatten(1)}


@pytest.mark.parametrize("method", ["AT", "NST", "KDSVD"])
def test_a_loss_without_a_gradient_is_refused(method, groups):
    """All activations of a 1x1 map are in one place; torchvision's ResNets end in such a map for 32x32 images."""
    with pytest.raises(UserError, match=rf"{method} compares .* 1x1.*; use larger images, or DISTILLER.PAIRS"):
        build(method, network(PARTNER), OnePosition(), config(groups))
    for other in ("SP", "VID", "REVIEWKD", "FITNET"):
        assert trained(other, network(PARTNER), OnePosition(), config(groups)).reached
