"""NORM against its equations, its layers within the student, and the one convolution that they merge into."""

import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from yacs.config import CfgNode as CN

from mdistiller.distillers import NORM, method_defaults
from mdistiller.distillers.contract import check_scores
from mdistiller.distillers.NORM import norm_loss, scaled_logits, stage_weight
from mdistiller.errors import UserError
from mdistiller.models.cost import network_cost

from .._networks import TwoMaps
from . import by_hand, tensor_rows
from .by_hand import batch, network
from .checks import check_agrees, check_precision, masked, normal

CIFAR = ([10, 20, 180, 210], [0.1, 0.5, 1.0, 0.5, 0.1])
IMAGENET = ([5, 15, 60, 80], [0.1, 0.5, 0.9, 0.5, 0.1])


@pytest.mark.parametrize("row", tensor_rows.rows("NORM"))
def test_pinned(row):
    opts, seed = row["opts"], row["seed"]
    (own, taught), channels = opts["sizes"], opts["channels"]
    student = tensor_rows.normal(seed + 4, (8, opts["N"] * channels, own, own))
    teacher = tensor_rows.normal(seed + 5, (8, channels, taught, taught)).detach()
    tensor_rows.check(row, lambda: norm_loss(student, teacher), student=student)


def test_agrees_with_loops_over_slices_and_cells():
    def naive(expanded, f_t):
        total = 0.0
        for n in range(3):
            squares = [
                (expanded[b, 2 * n + c, y, x] - f_t[b, c, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].max()) ** 2
                for b in range(2) for c in range(2) for y in range(2) for x in range(2)
            ]  # fmt: skip
            total = total + sum(squares) / len(squares)
        return total

    check_agrees(norm_loss, naive, normal(2, 6, 2, 2), normal(2, 2, 4, 4, seed=1))


def test_by_hand():
    """Slices (1, 3) and (2, 0) against (1, 1): (0 + 4) / 2 + (1 + 1) / 2 = 3. Logits (3, 1): (1, -1) times 2.5."""
    expanded, f_t = torch.tensor([1.0, 3.0, 2.0, 0.0]).reshape(1, 4, 1, 1), torch.ones(1, 2, 1, 1)
    assert norm_loss(expanded, f_t).item() == 3
    assert scaled_logits(torch.tensor([[3.0, 1.0]]), 2.5).flatten().tolist() == pytest.approx([2.5, -2.5], rel=1e-6)


def test_a_smaller_map_of_the_teachers():
    """The student's is average-pooled to it: 2x2 cells of 1, 2, 3, 4 to 2.5."""
    expanded = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 2, 2)
    assert norm_loss(expanded, torch.ones(1, 1, 1, 1)).item() == pytest.approx(1.5**2)


def test_scaled_logits_are_a_layer_norm():
    logits = 3 * normal(5, 7) + 2
    expected = 2.5 * F.layer_norm(logits, (7,), eps=1e-7)
    torch.testing.assert_close(scaled_logits(logits, 2.5), expected, rtol=1e-12, atol=1e-12)
    assert scaled_logits(logits, 0) is logits


def test_scaled_logits_of_odd_values():
    """Of 1e4 and more, all equal, of one class left, and with masked classes, which do not count."""
    for logits in (1e4 * normal(3, 5), torch.ones(3, 5), 1e30 * normal(3, 5), normal(3, 2), normal(1, 5)):
        logits = logits.clone().requires_grad_()
        scaled = scaled_logits(logits, 2.5)
        (slope,) = torch.autograd.grad(F.cross_entropy(scaled, torch.zeros(len(logits), dtype=torch.long)), logits)
        assert scaled.isfinite().all() and slope.isfinite().all()
    assert scaled_logits(torch.full((2, 4), 7.0), 2.5).abs().max() == 0
    logits = masked(3, 6, classes=[(0, 1), (0, 4), (2, 5)])
    scaled = scaled_logits(logits, 2.5)
    assert scaled[0, [1, 4]].tolist() == [-math.inf, -math.inf]
    torch.testing.assert_close(scaled[0, [0, 2, 3, 5]], scaled_logits(logits[:1, [0, 2, 3, 5]], 2.5)[0])


def test_gradcheck_and_precisions():
    f_t = normal(2, 3, 4, 4, seed=1)
    assert torch.autograd.gradcheck(lambda e: norm_loss(e, f_t), normal(2, 6, 2, 2).requires_grad_())
    assert torch.autograd.gradcheck(lambda z: scaled_logits(z, 2.5), normal(3, 4).requires_grad_())
    check_precision(norm_loss, normal(4, 6, 4, 4), normal(4, 3, 4, 4, seed=1))
    check_precision(lambda z: scaled_logits(z, 2.5).cos().mean(), normal(4, 6))


@pytest.mark.parametrize("lists", [CIFAR, IMAGENET])
def test_the_weight_of_an_epoch(lists):
    """CIFAR: epochs 1-9 0.1, 10-19 0.5, 20-179 1, 180-209 0.5, 210- 0.1. ImageNet: 1-4, 5-14, 15-59, 60-79, 80-."""
    stages, weights = lists
    for epoch in range(1, 241):
        expected = weights[sum(epoch >= stage for stage in stages)]
        assert stage_weight(epoch, stages, weights) == expected
        assert stage_weight(torch.tensor(epoch), stages, weights).item() == pytest.approx(expected, rel=1e-6)
    assert stage_weight(3, [], [0.7]) == 0.7


def built(student, teacher, **own):
    return by_hand.built(NORM, student, teacher, **own)


def disturbed(distiller):
    """Some steps, so that the BatchNorms' statistics and weights are no longer those of the start."""
    optimizer = torch.optim.SGD(distiller.get_learnable_parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        sum(distiller(**batch())[1].values()).backward()
        optimizer.step()
    return distiller.eval()


def test_the_layers_are_between_the_last_map_and_the_pooling():
    """x' = x + contract(expand(x)), in eval mode, by matrix products of each cell."""
    distiller = disturbed(built(network("resnet8"), network("resnet14"), N=2)).double()
    image = batch()["image"].double()
    x = distiller.student(image)[1]["last_map"]

    def layer(x, conv, bn):
        y = torch.einsum("bchw,oc->bohw", x, conv.weight.flatten(1))
        scale = bn.weight / (bn.running_var + bn.eps).sqrt()
        return y * scale[:, None, None] + (bn.bias - bn.running_mean * scale)[:, None, None]

    expected = distiller.student.fc((x + layer(layer(x, *distiller.expand), *distiller.contract)).mean((2, 3)))
    torch.testing.assert_close(distiller(image=image), expected, rtol=1e-9, atol=1e-12)


def test_wrns_layers_are_before_the_last_batchnorm_and_its_relu():
    distiller = disturbed(built(network("wrn_16_1"), network("resnet14"), N=2)).double()
    student, image = distiller.student, batch()["image"].double()
    assert int(student.bn1.num_batches_tracked) == int(student.block3.layer[0].bn1.num_batches_tracked) == 3
    x = student(image)[1]["feats"][-1]
    widened = x + distiller.contract(distiller.expand(x))
    expected = student.fc(F.relu(student.bn1(widened)).mean((2, 3)))
    torch.testing.assert_close(distiller(image=image), expected, rtol=1e-9, atol=1e-12)


PAIRS = [("resnet8", "wrn_16_2"), ("wrn_16_1", "resnet14"), ("MobileNetV2", "vgg8"), ("ShuffleV2", "resnet8x4")]


@pytest.mark.parametrize("student, teacher", PAIRS)
def test_the_merged_network_gives_the_same_logits(student, teacher):
    distiller = disturbed(built(network(student), network(teacher), N=2))
    check_scores(distiller, 32)
    (whole,) = distiller.deployments().values()
    image = batch(16)["image"]
    twin = copy.deepcopy(distiller).double()
    with torch.no_grad():
        single, double = distiller(image=image), twin(image=image.double())
        state = {name: value.clone() for name, value in whole.state_dict().items()}
        for own, logits, atol in ((distiller, single, 1e-5), (twin, double, 1e-10)):
            own.merge()
            (merged,) = own.deployments().values()
            assert (own(image=image.to(logits)) - logits).abs().max() <= atol * max(1, float(logits.abs().max()))
    assert all(value.equal(state[name]) for name, value in whole.state_dict().items())
    layers = {name.split(".")[0] for name in merged.state_dict()}
    assert layers == {"student", "merged", "classifier"} | ({"norm"} if student.startswith("wrn") else set())
    assert network_cost(merged, 32).parameters < network_cost(whole, 32).parameters
    distiller.merge()  # once
    assert merged.merged.weight.shape[2:] == (1, 1)


def test_every_parameter_is_trained_and_counted():
    """resnet8x4 with 8 times 256 channels: 2 x 256 x 2048 and the BatchNorms' 2 x (2048 + 256)."""
    distiller = built(network("resnet8x4", 100), network("resnet32x4", 100))
    assert distiller.get_extra_parameters() == 2 * 256 * 2048 + 2 * (2048 + 256) == 1_053_184
    (deployed,) = distiller.deployments().values()
    assert network_cost(deployed, 32).parameters == 1_233_540 + 1_053_184
    sum(distiller(**batch())[1].values()).backward()
    assert all(p.grad is not None for p in distiller.get_learnable_parameters())
    distiller.merge()
    (merged,) = distiller.deployments().values()
    assert network_cost(merged, 32).parameters == 1_233_540 + 256 * 257


def test_losses_follow_their_weights_and_the_logits_are_scaled():
    student, teacher = network("resnet8"), network("resnet14")
    distiller = built(student, teacher, N=2).eval()
    logits, losses = distiller.forward_train(**batch())
    assert set(losses) == {"loss_ce", "loss_feat"} and distiller.frozen["teacher"] == ("last_map",)
    torch.testing.assert_close(logits.std(dim=1, correction=0), torch.full((4,), 2.5), rtol=1e-4, atol=0)
    assert losses["loss_ce"].item() == pytest.approx(0.125 * F.cross_entropy(logits, batch()["target"]).item())
    later = distiller.forward_train(**batch(epoch=20))[1]
    assert later["loss_feat"].item() == pytest.approx(10 * losses["loss_feat"].item(), rel=1e-5)
    plain = distiller(image=batch()["image"])  # what is deployed
    torch.testing.assert_close(scaled_logits(plain, 2.5), logits)

    cfg = CN({"NORM": method_defaults["NORM"].clone()})
    cfg.merge_from_list(["NORM.LOSS.KD_WEIGHT", 0.5, "NORM.LOGIT_SCALE", 0.0, "NORM.N", 2])
    torch.manual_seed(0)
    with_kd = NORM(student, teacher, cfg, 32).eval()
    logits, losses = with_kd.forward_train(**batch())
    taught = teacher(batch()["image"])[0]
    log_s, log_t = (torch.log_softmax(z / 4, 1) for z in (logits, taught))
    expected = 0.5 * 16 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)
    assert losses["loss_kd"].item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(logits, with_kd(image=batch()["image"]))


def test_layers_that_are_exchanged_in_the_student_are_those_that_run():
    distiller = built(network("wrn_16_1"), network("resnet14"), N=1)
    distiller.student.bn1 = nn.BatchNorm2d(64)
    distiller.train()
    (deployed,) = distiller.deployments().values()
    assert deployed.norm is distiller.student.bn1


def test_refusals():
    for own in ({"STAGES": [10, 5, 180, 210]}, {"STAGES": [10]}, {"STAGE_WEIGHTS": [1.0]}):
        with pytest.raises(UserError, match=r"must be growing epochs, and .* one weight more"):
            built(network("resnet8"), network("resnet14"), **own)
    with pytest.raises(UserError, match=r"NORM reads the map that the student TwoMaps pools"):
        built(TwoMaps(), network("resnet14"))
    with pytest.raises(ValueError, match="N times the channels"):
        norm_loss(normal(2, 5, 4, 4), normal(2, 2, 4, 4))
