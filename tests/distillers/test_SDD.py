"""SDD's three losses against loops over samples, regions and classes; its regions; its rule of weight 2."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from yacs.config import CfgNode as CN

from mdistiller.distillers import distiller_dict, method_defaults
from mdistiller.distillers._logits import standardized
from mdistiller.distillers.DKD import dkd_loss
from mdistiller.distillers.KD import kd_loss
from mdistiller.distillers.NKD import nkd_loss
from mdistiller.distillers.SDD import (
    pooled_regions,
    region_logits,
    region_weights,
    sdd_dkd_loss,
    sdd_kd_loss,
    sdd_nkd_loss,
)
from mdistiller.engine.cfg import CFG, load_cfg
from mdistiller.errors import UserError
from mdistiller.models import cifar_model_dict
from mdistiller.models.sources import build_network

from . import tensor_rows
from .checks import check_agrees, check_precision, masked, normal

BASES = {
    "SDD_KD": (lambda s, t, y: sdd_kd_loss(s, t, y, 4.0), lambda s, t, y: kd_loss(s, t, 4.0)),
    "SDD_DKD": (lambda s, t, y: sdd_dkd_loss(s, t, y, 1.0, 8.0, 4.0), lambda s, t, y: dkd_loss(s, t, y, 1.0, 8.0, 4.0)),
    "SDD_NKD": (lambda s, t, y: sdd_nkd_loss(s, t, y, 3.0, 1.5), lambda s, t, y: nkd_loss(s, t, y, 3.0, 1.5)),
}


def naive(base):
    """The mean over samples and regions of weight times the base method's loss of that one region."""

    def loss(s, t, y):
        total = s.new_zeros(())
        for i in range(len(s)):
            right = [int(t[i, :, r].argmax()) == int(y[i]) for r in range(s.shape[2])]
            for r in range(s.shape[2]):
                one = base(s[i : i + 1, :, r], t[i : i + 1, :, r], y[i : i + 1])
                total = total + (2 if right[r] != right[0] else 1) * one
        return total / (s.shape[0] * s.shape[2])

    return loss


def half_right(t):
    """Labels that are the teacher's prediction of the whole map for every second image."""
    predicted = t[:, :, 0].argmax(dim=1)
    return torch.where(torch.arange(len(t)) % 2 == 0, predicted, (predicted + 1) % t.shape[1])


@pytest.mark.parametrize("method", BASES)
@pytest.mark.parametrize("batch, classes, regions", [(1, 2, 5), (4, 3, 21), (6, 10, 5)])
def test_agrees_with_loops(method, batch, classes, regions):
    loss, base = BASES[method]
    s, t = normal(batch, classes, regions), 3 * normal(batch, classes, regions, seed=1)
    y = half_right(t)
    if batch > 1:
        weights = region_weights(t, y)
        assert {1.0, 2.0} == set(weights.flatten().tolist()) and (weights[:, 0] == 1).all()
    check_agrees(lambda s, t: loss(s, t, y), lambda s, t: naive(base)(s, t, y), s, t)


def test_the_released_nkd_keeps_the_target():
    s, t, y = normal(3, 4, 5), 3 * normal(3, 4, 5, seed=1), torch.tensor([0, 3, 1])

    def base(s, t, y):
        ours = -t.softmax(1)[0, y] * s.log_softmax(1)[0, y]
        return (ours - 1.5 * 9 * ((t / 3).softmax(1) * (s / 3).log_softmax(1)).sum()).squeeze()

    check_agrees(
        lambda s, t: sdd_nkd_loss(s, t, y, 3.0, 1.5, keep_target=True), lambda s, t: naive(base)(s, t, y), s, t
    )


def test_by_hand():
    """Two regions; teacher (1/2, 1/2 and more at the label in region 0, less in region 1), student uniform."""
    p = torch.tensor(
        [[[3 / 4, 1 / 4], [1 / 4, 3 / 4]]], dtype=torch.float64
    )  # region 0 predicts class 0, region 1 class 1
    s, y = torch.zeros(1, 2, 2, dtype=torch.float64), torch.tensor([0])
    kl = 3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2)
    assert region_weights(p.log(), y).tolist() == [[1, 2]]  # region 0 is right, region 1 is not
    assert sdd_kd_loss(s, p.log(), y, 1.0).item() == pytest.approx((1 + 2) * kl / 2, rel=1e-12)
    assert sdd_kd_loss(s, 2 * p.log(), y, 2.0).item() == pytest.approx(4 * (1 + 2) * kl / 2, rel=1e-12)
    # Two classes: b is p, and q is (1,): DKD's target term alone, NKD's first term alone.
    assert sdd_dkd_loss(s, p.log(), y, 1.0, 8.0, 1.0).item() == pytest.approx(3 * kl / 2, rel=1e-12)
    nkd = (1 * 3 / 4 + 2 * 1 / 4) * math.log(2) / 2
    assert sdd_nkd_loss(s, p.log(), y, 1.0, 8.0).item() == pytest.approx(nkd, rel=1e-12)


def naive_regions(x, scales):
    height, width = x.shape[2:]
    fine = x.new_zeros(*x.shape[:2], 4, 4)
    for i in range(4):
        for j in range(4):
            rows = slice(math.floor(i * height / 4), math.ceil((i + 1) * height / 4))
            columns = slice(math.floor(j * width / 4), math.ceil((j + 1) * width / 4))
            fine[:, :, i, j] = x[:, :, rows, columns].mean((2, 3))
    found = []
    for n in scales:
        k = 4 // n
        found += [fine[:, :, i * k : i * k + k, j * k : j * k + k].mean((2, 3)) for i in range(n) for j in range(n)]
    return torch.stack(found, dim=2)


@pytest.mark.parametrize("size", [1, 2, 4, 7, 8])
@pytest.mark.parametrize("scales", [[1, 2], [1, 2, 4]])
def test_regions_in_their_order(size, scales):
    x = normal(2, 3, size, size)
    torch.testing.assert_close(pooled_regions(x, scales), naive_regions(x, scales))
    weight, bias = normal(5, 3, seed=1), normal(5, seed=2)
    own = region_logits(x, weight, bias, scales)
    torch.testing.assert_close(own[:, :, 3], naive_regions(x, scales)[:, :, 3] @ weight.T + bias)


def test_regions_of_seven_overlap_and_come_from_the_sixteen():
    x = torch.arange(49, dtype=torch.float64).view(1, 1, 7, 7)
    fine = pooled_regions(x, [1, 2, 4])[0, 0, 5:]
    assert fine[0] == (0 + 1 + 7 + 8) / 4 and fine[1] == (1 + 2 + 3 + 8 + 9 + 10) / 6
    assert pooled_regions(x, [1, 2])[0, 0, 1] == fine[[0, 1, 4, 5]].mean()
    assert pooled_regions(x, [1, 2])[0, 0, 1] != x[0, 0, :4, :4].mean()


@pytest.mark.parametrize("method", BASES)
def test_gradients_and_precision(method):
    loss, _ = BASES[method]
    s, t, y = normal(2, 4, 5), normal(2, 4, 5, seed=1), torch.tensor([3, 0])
    assert gradcheck(lambda s: loss(s, t, y), (s.clone().requires_grad_(),))
    check_precision(lambda s, t: loss(s, t, y), s, t)


@pytest.mark.parametrize("method", BASES)
def test_far_logits_one_hot_teachers_and_equal_logits(method):
    loss, base = BASES[method]
    y = torch.tensor([0, 1])
    for classes in (2, 5):
        ahead = torch.zeros(2, classes, 5)
        ahead[:, 0] = 1e4
        for s, t in ((ahead, -ahead), (-ahead, ahead), (ahead, 0 * ahead), (0 * ahead, ahead), (0 * ahead, 0 * ahead)):
            s = s.clone().requires_grad_()
            value = loss(s, t, y)
            value.backward()
            assert value.isfinite() and s.grad.isfinite().all()
            torch.testing.assert_close(value.detach(), naive(base)(s.detach(), t, y))


@pytest.mark.parametrize("method", BASES)
def test_masked_classes_contribute_nothing(method):
    loss, base = BASES[method]
    s, y = normal(3, 4, 5), torch.tensor([0, 1, 3])
    t = masked(3, 4, 5, classes=[(0, 2), (1, 0), (1, 3), (2, 3)], seed=1)
    check_agrees(lambda s, t: loss(s, t, y), lambda s, t: naive(base)(s, t, y), s, t)
    check_precision(lambda s, t: loss(s, t, y), s, t)


def test_standardised_logits_are_those_of_each_region():
    s, t, y = normal(3, 4, 5), 3 * normal(3, 4, 5, seed=1), torch.tensor([0, 1, 3])
    rest = y, 2.0
    alone = standardized(t[:, :, 2:3])
    torch.testing.assert_close(standardized(t)[:, :, 2:3], alone)
    own = sdd_kd_loss(s, t, *rest, logit_stand=True)
    torch.testing.assert_close(own, sdd_kd_loss(standardized(s), standardized(t), *rest))


def regions_of(row):
    seed, shape = row["seed"], (8, 100, row["opts"]["regions"])
    y = tensor_rows.labels(seed)
    t = tensor_rows.normal(seed + 2, shape, 3).detach().clone()
    for i in range(8):
        for r in range(shape[2]):
            if (r == 0 and i < 4) or (r > 0 and (i + r) % 2 == 0):
                t[i, y[i], r] += 12
    return tensor_rows.normal(seed + 1, shape, 2), t, y


@pytest.mark.parametrize("row", tensor_rows.rows("SDD_KD"))
def test_pinned_kd(row):
    s, t, y = regions_of(row)
    assert region_weights(t, y).eq(2).any()
    tensor_rows.check(row, lambda: sdd_kd_loss(s, t, y, row["opts"]["T"]), student=s)


@pytest.mark.parametrize("row", tensor_rows.rows("SDD_DKD"))
def test_pinned_dkd(row):
    s, t, y = regions_of(row)
    tensor_rows.check(row, lambda: sdd_dkd_loss(s, t, y, 1.0, 8.0, row["opts"]["T"]), student=s)


@pytest.mark.parametrize("row", tensor_rows.rows("SDD_NKD"))
def test_pinned_nkd(row):
    s, t, y = regions_of(row)
    released = "as released" in row["what"]
    tensor_rows.check(row, lambda: sdd_nkd_loss(s, t, y, row["opts"]["T"], 1.5, keep_target=released), student=s)


@pytest.mark.parametrize("row", tensor_rows.rows("SDD"))
def test_pinned_regions(row):
    size = row["opts"]["size"]
    x = tensor_rows.normal(row["seed"] + 4, (8, 16, size, size))
    scales = [int(c) for c in row["opts"]["M"].strip("[]").split(",")]
    assert list(pooled_regions(x, scales).shape) == row["regions"]
    tensor_rows.check(row, lambda: pooled_regions(x, scales).square().sum(), map=x)


def built(method, *options, student="resnet8", teacher="wrn_16_1", classes=10):
    torch.manual_seed(0)
    cfg = CFG.clone()
    cfg.merge_from_list(list(options))
    nets = (cifar_model_dict[name][0](num_classes=classes) for name in (student, teacher))
    return distiller_dict[method](*nets, cfg, image_size=32).train()


BATCH = {"image": torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3)), "epoch": 5}


@pytest.mark.parametrize("method, factor", [("SDD_KD", 0.9), ("SDD_DKD", 5 / 20), ("SDD_NKD", 5 / 20)])
def test_a_step_with_labels_of_which_the_teacher_knows_half(method, factor):
    distiller = built(method, "SDD.M", "[1, 2, 4]")
    t_logits, t_features = distiller.teacher(BATCH["image"])
    y = half_right(t_logits[:, :, None])
    _, features = distiller.student(BATCH["image"])
    s, t = (
        nn.functional.linear(naive_regions(f["last_map"], [1, 2, 4]).transpose(1, 2), n.fc.weight, n.fc.bias)
        for f, n in ((features, distiller.student), (t_features, distiller.teacher))
    )
    base = {
        "SDD_KD": lambda s, t, y: kd_loss(s, t, 4.0),
        "SDD_DKD": lambda s, t, y: dkd_loss(s, t, y, 1.0, 8.0, 4.0),
        "SDD_NKD": lambda s, t, y: nkd_loss(s, t, y, 1.0, 1.5),
    }[method]
    wanted = factor * naive(base)(s.transpose(1, 2), t.transpose(1, 2), y)
    _, losses = distiller(**BATCH, target=y)
    assert set(losses) == {"loss_ce", "loss_kd"}
    torch.testing.assert_close(losses["loss_kd"], wanted, rtol=1e-4, atol=1e-6)
    assert {k for k in distiller.state_dict() if not k.startswith(("student.", "teacher."))} == set()
    sum(losses.values()).backward()
    assert distiller.student.fc.weight.grad.abs().sum() > 0 and distiller.get_extra_parameters() == 0


def test_its_settings():
    y = torch.tensor([1, 2, 3, 4])
    plain = built("SDD_NKD", "SDD.NKD_WARMUP", "0")(**BATCH, target=y)[1]["loss_kd"]
    for options in (
        ("NKD.GAMMA", "3.0"),
        ("SDD.M", "[1, 2]"),
        ("SDD.NKD_KEEPS_TARGET", "True"),
        ("NKD.TEMPERATURE", "3.0"),
    ):
        other = built("SDD_NKD", "SDD.NKD_WARMUP", "0", *options)(**BATCH, target=y)[1]["loss_kd"]
        assert abs(other.item() - plain.item()) > 1e-4, options


def test_refusals():
    s = torch.zeros(1, 3, 5)
    with pytest.raises(UserError, match=r"\(1, 3, 5\) and teacher logits \(1, 4, 5\)"):
        sdd_kd_loss(s, torch.zeros(1, 4, 5), torch.tensor([0]), 4.0)
    with pytest.raises(ValueError, match="positive, it is -1"):
        sdd_dkd_loss(s, s, torch.tensor([0]), 1.0, 8.0, -1.0)
    for loss in (lambda z, y: sdd_dkd_loss(z, z, y, 1, 1, 1), lambda z, y: sdd_nkd_loss(z, z, y, 1, 1)):
        with pytest.raises(ValueError, match="needs two classes or more, the logits have 1"):
            loss(torch.zeros(1, 1, 5), torch.tensor([0]))
    config = Path(__file__).parents[2] / "configs/cifar100/kd.yaml"
    for bad in ("[1, 4]", "[2]", "[1.5, 2]", "[]", "[4, 2, 1]"):
        with pytest.raises(UserError, match=r"SDD\.M must be \[1, 2\] or \[1, 2, 4\]"):
            load_cfg(config, ["DISTILLER.TYPE", "SDD_KD", "SDD.M", bad])
    for good in ("[1,2]", "[1,2,4]"):
        load_cfg(config, ["DISTILLER.TYPE", "SDD_KD", "SDD.M", good])


class Without(nn.Module):
    def __init__(self, last_map=False, classifier=False, between=False):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, 4), nn.Linear(4, 10)
        self.last_map, self.between = last_map, between
        if classifier:
            self.get_classifier = lambda: self.fc

    def forward(self, x):
        x = self.conv(x)
        logits = self.fc(x.mean((2, 3)).tanh() if self.between else x.mean((2, 3)))
        return logits, {"feats": [x], **({"last_map": x} if self.last_map else {})}


@pytest.mark.parametrize("method", [*BASES, "CAT_KD"])
def test_networks_without_a_last_map_or_a_classifier_are_refused_when_it_is_built(method):
    own, cfg = cifar_model_dict["resnet8"][0](num_classes=10), CFG.clone()
    cases = [
        (
            Without(),
            r"reads the map that the student Without pools for its classifier, but it has none; let it return fea",
        ),
        (Without(last_map=True), r"Without does not tell its classifier; give it a method get_classifier\(self\)"),
        (Without(True, True, between=True), "but its logits are not its classifier's output for the mean of that map"),
    ]
    for network, words in cases:
        with pytest.raises(UserError, match=words):
            distiller_dict[method](network, own, cfg, image_size=32)
    with pytest.raises(UserError, match="the teacher Without"):
        distiller_dict[method](own, Without(), cfg, image_size=32)
    distiller_dict[method](Without(True, True), own, cfg, image_size=32)


def test_a_class_token_is_refused():
    pytest.importorskip("timm")
    own = cifar_model_dict["resnet8"][0](num_classes=10)
    vit = build_network("timm/vit_tiny_patch16_224", 10, 32)
    with pytest.raises(UserError, match=r"the teacher timm/vit_tiny_patch16_224 pools .* a class token"):
        distiller_dict["SDD_KD"](own, vit, CFG.clone(), image_size=32)


def test_by_hand_without_a_run():
    """A method that is built by hand reads the data set's size from the tree."""
    cfg = CN({name: method_defaults[name].clone() for name in ("SDD", "KD")})
    cfg.DATASET = CFG.DATASET.clone()
    nets = (cifar_model_dict["resnet8"][0](num_classes=10) for _ in range(2))
    distiller_dict["SDD_KD"](*nets, cfg)
