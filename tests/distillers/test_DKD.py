"""DKD against its equations, also for inputs on which the usual form fails."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from yacs.config import CfgNode as CN

from mdistiller.distillers import DKD, method_defaults
from mdistiller.distillers.DKD import dkd_loss
from mdistiller.distillers.KD import kd_loss
from mdistiller.models import cifar_model_dict

from .checks import check_agrees, check_precision, normal
from .oracles.dkd import naive_dkd_loss


@pytest.mark.parametrize(
    "batch, classes, alpha, beta, temperature",
    [(1, 2, 1.0, 8.0, 4.0), (5, 3, 0.5, 2.0, 1.0), (4, 10, 1, 0, 4), (4, 10, 0, 1, 4), (3, 100, 1.0, 6.0, 0.7)],
)
def test_agrees_with_the_naive_form(batch, classes, alpha, beta, temperature):
    logits, target = (normal(batch, classes), 3 * normal(batch, classes, seed=1)), torch.arange(batch) * 7 % classes
    rest = target, alpha, beta, temperature
    check_agrees(lambda s, t: dkd_loss(s, t, *rest), lambda s, t: naive_dkd_loss(s, t, *rest), *logits)


def test_by_hand():
    # Target 0. Teacher (1/2, 1/8, 3/8), student (1/4, 3/8, 3/8).
    p_t, p_s = (torch.tensor([p], dtype=torch.float64) for p in ((1 / 2, 1 / 8, 3 / 8), (1 / 4, 3 / 8, 3 / 8)))
    tckd = 1 / 2 * math.log(2) + 1 / 2 * math.log(2 / 3)
    nckd = 1 / 4 * math.log(1 / 2) + 3 / 4 * math.log(3 / 2)  # (1/4, 3/4) against (1/2, 1/2)
    target = torch.tensor([0])
    assert dkd_loss(p_s.log(), p_t.log(), target, 1, 0, 1).item() == pytest.approx(tckd, rel=1e-12)
    assert dkd_loss(p_s.log(), p_t.log(), target, 0, 1, 1).item() == pytest.approx(nckd, rel=1e-12)
    assert dkd_loss(2 * p_s.log(), 2 * p_t.log(), target, 3, 5, 2).item() == pytest.approx(4 * (3 * tckd + 5 * nckd))


def test_kd_is_its_special_case():
    """KD = TCKD + (1 - p_t[y]) NCKD, sample by sample."""
    s, t, y = normal(1, 6), normal(1, 6, seed=1), torch.tensor([2])
    rest = 1 - torch.softmax(t / 4, dim=1)[0, 2].item()
    assert kd_loss(s, t, 4).item() == pytest.approx(dkd_loss(s, t, y, 1, rest, 4).item(), rel=1e-12)


def test_gradients_and_precision():
    s, t, y = normal(3, 5), normal(3, 5, seed=1), torch.tensor([4, 0, 2])
    assert gradcheck(lambda s, t: dkd_loss(s, t, y, 1.0, 8.0, 4.0), (s.requires_grad_(), t.requires_grad_()))
    check_precision(lambda s, t: dkd_loss(s, t, y, 1.0, 8.0, 4.0), s.detach(), t.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 3, 100])
@pytest.mark.parametrize("lead", [200.0, 1e4, -1e4])
def test_finite_for_a_large_logit(lead, classes, dtype):
    target = torch.tensor([0, 1])
    ahead = torch.zeros(2, classes, dtype=dtype)
    ahead[:, 0] = lead
    for s, t in ((ahead, -ahead), (-ahead, ahead), (ahead, 0 * ahead), (0 * ahead, ahead)):
        s = s.clone().requires_grad_()
        loss = dkd_loss(s, t, target, 1.0, 8.0, 1.0)
        loss.backward()
        assert loss.isfinite() and s.grad.isfinite().all()
    # The teacher has p = 1 for class 0, the student p = 0: the loss is the student's -log p, which `lead` dominates.
    certain = dkd_loss(-ahead[:1].abs(), ahead[:1].abs(), target[:1], 1.0, 0.0, 1.0).item()
    assert certain == pytest.approx(abs(lead) + math.log(classes - 1), rel=1e-6)


def test_two_classes_have_no_non_target_term():
    s, t, y = normal(4, 2).requires_grad_(), normal(4, 2, seed=1), torch.tensor([0, 1, 1, 0])
    loss = dkd_loss(s, t, y, 0.0, 8.0, 4.0)
    loss.backward()
    assert loss.item() == 0 and s.grad.eq(0).all()
    assert dkd_loss(s, t, y, 1.0, 8.0, 4.0).item() == pytest.approx(kd_loss(s, t, 4.0).item(), rel=1e-12)


@pytest.mark.parametrize("epoch, scale", [(1, 0.05), (10, 0.5), (20, 1), (240, 1)])
def test_warm_up(epoch, scale):
    torch.manual_seed(0)
    nets = [cifar_model_dict["resnet8"][0](num_classes=10) for _ in range(2)]
    batch = {"image": torch.randn(2, 3, 32, 32), "target": torch.tensor([3, 4]), "epoch": epoch}
    cfg = CN({"DKD": method_defaults["DKD"].clone()})
    method = DKD(*nets, cfg).train()
    _, losses = method(**batch)
    method.warmup = 0
    _, full = method(**batch)
    assert losses["loss_kd"].item() == pytest.approx(scale * full["loss_kd"].item(), rel=1e-5)
    assert losses["loss_ce"].item() == pytest.approx(full["loss_ce"].item(), rel=1e-5)


def test_refusals():
    y = torch.tensor([0])
    with pytest.raises(ValueError, match=r"\(1, 3\) and teacher logits \(1, 4\)"):
        dkd_loss(torch.zeros(1, 3), torch.zeros(1, 4), y, 1, 1, 4)
    with pytest.raises(ValueError, match="positive, it is -1"):
        dkd_loss(torch.zeros(1, 3), torch.zeros(1, 3), y, 1, 1, -1)
    with pytest.raises(ValueError, match="two classes or more, the logits have 1"):
        dkd_loss(torch.zeros(1, 1), torch.zeros(1, 1), y, 1, 1, 4)
