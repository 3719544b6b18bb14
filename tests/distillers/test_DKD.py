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

from .checks import check_agrees, check_precision, masked, normal
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


TARGET = torch.tensor([0, 1, 2, 3, 1])
TEACHER_MASKS = {
    "the target": [(0, 0), (3, 3)],
    "several others": [(0, 1), (0, 4), (1, 0), (2, 0), (2, 1), (2, 4)],
    "all but one other": [(0, 0), (0, 1), (0, 2), (0, 3)],
    "all others": [*((0, c) for c in (1, 2, 3, 4)), *((3, c) for c in (0, 1, 2, 4))],
}


@pytest.mark.parametrize("same", [False, True], ids=["teacher", "both"])
@pytest.mark.parametrize("mask", TEACHER_MASKS)
@pytest.mark.parametrize("alpha, beta, temperature", [(1.0, 8.0, 4.0), (1.0, 0.0, 1.0), (0.0, 1.0, 0.5)])
def test_masked_classes_contribute_nothing(mask, alpha, beta, temperature, same):
    places = TEACHER_MASKS[mask]
    s, t = masked(5, 5, classes=places if same else []), masked(5, 5, classes=places, seed=1)
    rest = TARGET, alpha, beta, temperature
    check_agrees(lambda s, t: dkd_loss(s, t, *rest), lambda s, t: naive_dkd_loss(s, t, *rest), s, t)
    check_agrees(lambda t, s: dkd_loss(s, t, *rest), lambda t, s: naive_dkd_loss(s, t, *rest), t, s)
    check_precision(lambda s, t: dkd_loss(s, t, *rest), s, t)
    check_precision(lambda t, s: dkd_loss(s, t, *rest), t, s)
    assert torch.isfinite(dkd_loss(s.half(), t.half(), *rest))


def both_terms(p_s, p_t):
    """(TCKD, NCKD, the gradient of their sum in the student's logits) for the target 0 at temperature 1."""
    s, t = (torch.tensor([p], dtype=torch.float64).log().requires_grad_() for p in (p_s, p_t))
    target = torch.tensor([0])
    of_student, of_teacher = torch.autograd.grad(dkd_loss(s, t, target, 1, 1, 1), (s, t))
    assert of_teacher.isfinite().all()
    return dkd_loss(s, t, target, 1, 0, 1).item(), dkd_loss(s, t, target, 0, 1, 1).item(), of_student.tolist()[0]


def test_masked_classes_by_hand():
    log2, approx, student = math.log(2), pytest.approx, (1 / 2, 1 / 4, 1 / 4)
    # The target is masked: (0, 1) against (1/2, 1/2), and (1/4, 3/4) against (1/2, 1/2).
    nckd = 1 / 4 * math.log(1 / 2) + 3 / 4 * math.log(3 / 2)
    assert both_terms(student, (0, 1 / 4, 3 / 4)) == (approx(log2), approx(nckd), approx([1 / 2, 0, -1 / 2]))
    # One of the others is masked: equal, and (0, 1) against (1/2, 1/2).
    assert both_terms(student, (1 / 2, 0, 1 / 2)) == (approx(0), approx(log2), approx([0, 1 / 2, -1 / 2]))
    # All others are masked: (1, 0) against (1/2, 1/2), and no distribution over the others.
    assert both_terms(student, (1, 0, 0)) == (approx(log2), 0, approx([-1 / 2, 1 / 4, 1 / 4]))
    assert both_terms((1, 0, 0), (1, 0, 0)) == (0, 0, [0, 0, 0])


@pytest.mark.parametrize("p_s", [(0, 1 / 2, 1 / 2), (1 / 2, 0, 1 / 2), (1, 0, 0)])
def test_a_class_that_only_the_student_excludes_makes_it_infinite(p_s):
    s, t = (torch.tensor([p]).log() for p in (p_s, (1 / 2, 1 / 4, 1 / 4)))
    assert dkd_loss(s, t, torch.tensor([0]), 1.0, 1.0, 1.0).item() == math.inf


def test_masked_logits_of_two_classes_and_of_none():
    s, t, y = torch.zeros(1, 2, requires_grad=True), torch.tensor([[0, -math.inf]]), torch.tensor([0])
    for target, gradient in ((y, [-0.5, 0.5]), (1 - y, [-0.5, 0.5])):
        loss = dkd_loss(s, t, target, 1.0, 8.0, 1.0)
        assert loss.item() == pytest.approx(math.log(2))
        assert torch.autograd.grad(loss, s)[0].tolist() == [pytest.approx(gradient)]
    assert dkd_loss(s, torch.full((1, 2), -math.inf), y, 1.0, 8.0, 1.0).isnan()  # no class left: no distribution
    assert dkd_loss(s, torch.tensor([[0, math.nan]]), y, 1.0, 8.0, 1.0).isnan()


@pytest.mark.parametrize("lead", [200.0, 1e4, 1e38])
def test_float32_of_far_masked_logits(lead):
    s = torch.tensor([[lead, -lead, -math.inf, 0], [0, lead, -lead, 0]], requires_grad=True)
    t = torch.tensor([[-lead, lead, -math.inf, -math.inf], [lead, *[-math.inf] * 3]], requires_grad=True)
    loss = dkd_loss(s, t, torch.tensor([0, 0]), 1.0, 1.0, 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(1.5 * lead)  # first image: TCKD and NCKD are `lead`; second: TCKD is
    assert s.grad.isfinite().all() and t.grad.isfinite().all()


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
