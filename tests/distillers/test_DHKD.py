"""DHKD's binary loss against plain loops, by hand and at the limits of its clamp, and its second head."""

import math

import pytest
import torch
import torch.nn as nn
from torch.autograd import gradcheck
from yacs.config import CfgNode as CN

from mdistiller.distillers import DHKD, method_defaults
from mdistiller.distillers.DHKD import dhkd_loss
from mdistiller.errors import UserError
from mdistiller.models import cifar_model_dict

from .checks import check_agrees, check_precision, normal
from .tensor_rows import check, rows, student_logits, teacher_logits


def naive_dhkd_loss(s, t, temperature):
    """Plain loops over images and classes, with sigmoids."""
    total = torch.zeros((), dtype=s.dtype)
    for i in range(s.shape[0]):
        for c in range(s.shape[1]):
            sigma = torch.sigmoid((s[i, c] - t[i, c]) / temperature).clamp(1e-8, 1 - 1e-8)
            total = total + math.log(0.5) - (sigma.log() + (1 - sigma).log()) / 2
    return temperature**2 * total / s.shape[0]


@pytest.mark.parametrize("row", rows("DHKD"))
def test_tensor_rows(row):
    s = student_logits(row["seed"])
    check(row, lambda: dhkd_loss(s, teacher_logits(row["seed"]), row["opts"]["T"]), student=s)


@pytest.mark.parametrize("shape, temperature", [((1, 1), 2.0), ((1, 2), 4.0), ((5, 7), 2.0), ((3, 4), 0.2)])
def test_agrees_with_the_naive_form(shape, temperature):
    s, t = 2 * normal(*shape), 3 * normal(*shape, seed=1)
    check_agrees(lambda s, t: dhkd_loss(s, t, temperature), lambda s, t: naive_dhkd_loss(s, t, temperature), s, t)


def test_a_temperature_for_each_image():
    s, t = normal(3, 4), normal(3, 4, seed=1)
    one = dhkd_loss(s, t, torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64))
    each = [dhkd_loss(s[i : i + 1], t[i : i + 1], 2.0**i).item() for i in range(3)]
    assert one.item() == pytest.approx(sum(each) / 3)


def test_by_hand():
    """T 2: sigma 3/4 for a difference of 2 ln 3: ln 0.5 - (ln 3/4 + ln 1/4) / 2 = ln(2 / sqrt 3). Two of three."""
    far = 2 * math.log(3)
    s = torch.tensor([[far, 0.0, 5.0]], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([[0.0, far, 5.0]], dtype=torch.float64)
    loss = dhkd_loss(s, t, 2.0)
    assert loss.item() == pytest.approx(4 * 2 * math.log(2 / math.sqrt(3)))
    # T^2 / T * (sigma - 1 / 2): 2 * 1/4
    assert torch.autograd.grad(loss, s)[0].tolist()[0] == pytest.approx([0.5, -0.5, 0.0])


def test_gradients_and_precision():
    s, t = normal(3, 5).requires_grad_(), normal(3, 5, seed=1).requires_grad_()
    assert gradcheck(lambda s, t: dhkd_loss(s, t, 2.0), (s, t))
    check_precision(lambda s, t: dhkd_loss(s, t, 2.0), s.detach(), t.detach())
    check_precision(lambda s, t: dhkd_loss(s, t, 2.0), 20 * s.detach(), 20 * t.detach())


@pytest.mark.parametrize("apart", [1e-6, 1e-3])
def test_a_small_difference_does_not_cancel(apart):
    """ln cosh(d / 2) is d^2 / 8 there; in float32 ln 0.5 minus logarithms of sigmoids is 0 or noise."""
    s = torch.tensor([[apart]], requires_grad=True)
    loss = dhkd_loss(s, torch.zeros(1, 1), 2.0)
    loss.backward()
    assert loss.item() == pytest.approx(apart**2 / 8, rel=1e-5) and s.grad.item() == pytest.approx(apart / 4, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("apart", [36.0, 36.8, 37.0, 200.0, 1e4, torch.inf])
def test_the_clamp(apart, dtype):
    """Up to 18.42 T apart a class has the gradient of its sigmoid; beyond, its term is constant. T 2."""
    s = torch.tensor([[apart, -apart, 0.0]], dtype=dtype, requires_grad=True)
    loss = dhkd_loss(s, torch.zeros(1, 3, dtype=dtype), 2.0)
    loss.backward()
    held = 2 * (-(math.log(1e-8) + math.log1p(-1e-8)) / 2 - math.log(2))
    free = 2 * (apart / 4 - math.log(2))  # ln cosh(d / 2) without what is below 1e-8
    assert loss.item() == pytest.approx(4 * (held if apart > 36.85 else free), rel=1e-6)
    slope = 0.0 if apart > 36.85 else 1.0  # T * (sigma - 1/2)
    assert s.grad.tolist()[0] == pytest.approx([slope, -slope, 0.0], abs=1e-6)


def test_masked_classes_contribute_nothing():
    s, t = normal(2, 4).requires_grad_(), normal(2, 4, seed=1)
    t[0, 1] = t[1, 3] = -torch.inf
    kept = torch.isfinite(t)
    rest = sum(dhkd_loss(s[i : i + 1, kept[i]], t[i : i + 1, kept[i]], 2.0) for i in range(2)) / 2
    loss = dhkd_loss(s, t, 2.0)
    (grad,) = torch.autograd.grad(loss, s)
    assert loss.item() == pytest.approx(rest.item()) and grad[~kept].eq(0).all() and grad[kept].ne(0).all()
    both = s.detach().masked_fill(~kept, -torch.inf)
    assert dhkd_loss(both, t, 2.0).item() == pytest.approx(rest.item())


def test_refusals():
    with pytest.raises(UserError, match=r"\(1, 3\) and teacher logits \(1, 4\)"):
        dhkd_loss(torch.zeros(1, 3), torch.zeros(1, 4), 2.0)
    with pytest.raises(ValueError, match="positive, it is 0"):
        dhkd_loss(torch.zeros(1, 3), torch.zeros(1, 3), 0)


def build(**options):
    torch.manual_seed(0)
    nets = [cifar_model_dict["resnet8"][0](num_classes=10) for _ in range(2)]
    cfg = CN({"DHKD": method_defaults["DHKD"].clone()})
    cfg.merge_from_list([x for option in options.items() for x in option])
    return DHKD(*nets, cfg, image_size=32).train()


BATCH = {"image": torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), "target": torch.arange(4)}


@pytest.mark.parametrize("head, count", [("linear", 64 * 10 + 10), ("nonlinear", 64 * 200 + 200 + 400 + 200 * 10 + 10)])
def test_the_second_head_is_trained_and_not_deployed(head, count):
    method = build(**{"DHKD.HEAD": head})
    assert method.get_extra_parameters() == count == sum(p.numel() for p in method.head.parameters())
    assert method.deployments() == {"student": method.student}
    logits, losses = method(**BATCH, epoch=1)
    assert torch.equal(logits, method.student(BATCH["image"])[0])
    crossed = {"loss_kd": method.student.fc, "loss_ce": method.head}
    of_kd, of_ce = (
        torch.autograd.grad(losses[name], [*other.parameters()], retain_graph=True, allow_unused=True)
        for name, other in crossed.items()
    )
    assert {*of_kd, *of_ce} == {None}, "each head learns from its own loss"
    sum(losses.values()).backward()
    trained = method.get_learnable_parameters()
    assert len(trained) == len([*method.student.parameters(), *method.head.parameters()])
    assert all(p.grad is not None for p in trained)


def test_the_losses_are_those_of_the_two_heads():
    method = build(**{"DHKD.LOSS.CE_WEIGHT": 0.5, "DHKD.LOSS.KD_WEIGHT": 0.1})
    logits, losses = method(**BATCH, epoch=1)
    _, features = method.student(BATCH["image"])
    taught = method.teacher(BATCH["image"])[0].detach()
    expected = 0.1 * naive_dhkd_loss(method.head(features["pooled_feat"]), taught, 2.0)
    assert losses["loss_kd"].item() == pytest.approx(expected.item(), rel=1e-5)
    ce = nn.functional.cross_entropy(logits, BATCH["target"])
    assert losses["loss_ce"].item() == pytest.approx(0.5 * ce.item(), rel=1e-6)


@pytest.mark.parametrize("stop, epoch, share", [(0, 100, 1), (50, 49, 1), (50, 50, 0), (50, 99, 0), (1, 1, 0)])
def test_the_epoch_at_which_distillation_stops(stop, epoch, share):
    method, usual = build(**{"DHKD.STOP_EPOCH": stop}), build()
    for number in (epoch, torch.tensor(epoch)):  # as a compiled step has it
        found = method(**BATCH, epoch=number)[1]["loss_kd"].item()
        assert found == pytest.approx(share * usual(**BATCH, epoch=1)[1]["loss_kd"].item(), rel=1e-6)
