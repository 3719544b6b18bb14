"""KD against its equation, also where classes are masked out."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from mdistiller.distillers.KD import kd_loss

from .checks import check_agrees, check_precision, masked, normal
from .oracles.dkd import naive_kl


def naive_kd_loss(logits_student, logits_teacher, temperature):
    total = logits_student.new_zeros(())
    for z_s, z_t in zip(logits_student, logits_teacher):
        p_s, p_t = torch.softmax(z_s / temperature, dim=0), torch.softmax(z_t / temperature, dim=0)
        total = total + naive_kl(p_t, p_s)
    return temperature**2 * total / len(logits_student)


@pytest.mark.parametrize("batch, classes, temperature", [(1, 1, 4), (1, 2, 1.0), (5, 7, 4), (3, 100, 0.5)])
def test_agrees_with_the_naive_form(batch, classes, temperature):
    logits = normal(batch, classes), 3 * normal(batch, classes, seed=1)
    check_agrees(lambda s, t: kd_loss(s, t, temperature), lambda s, t: naive_kd_loss(s, t, temperature), *logits)


def test_by_hand():
    # Teacher (3/4, 1/4), student (1/2, 1/2): 3/4 log(3/2) + 1/4 log(1/2).
    logits_t = torch.tensor([[0.75, 0.25]], dtype=torch.float64).log()
    expected = 0.75 * torch.tensor(1.5).log().item() + 0.25 * torch.tensor(0.5).log().item()
    assert kd_loss(torch.zeros(1, 2, dtype=torch.float64), logits_t, 1).item() == pytest.approx(expected, rel=1e-6)
    # Logits twice as far apart at twice the temperature: four times the loss.
    assert kd_loss(torch.zeros(1, 2, dtype=torch.float64), 2 * logits_t, 2).item() == pytest.approx(4 * expected)
    assert kd_loss(logits_t, logits_t, 4).item() == 0


def test_gradients():
    s, t = normal(3, 5).requires_grad_(), normal(3, 5, seed=1).requires_grad_()
    assert gradcheck(lambda s, t: kd_loss(s, t, 4), (s, t))


def test_precision():
    check_precision(lambda s, t: kd_loss(s, t, 4), normal(3, 5), normal(3, 5, seed=1))


@pytest.mark.parametrize("lead", [200.0, 1e4])
def test_finite_for_a_large_logit(lead):
    s = torch.tensor([[lead, 0, 0]], requires_grad=True)
    loss = kd_loss(s, s.detach().flip(1), 1)
    loss.backward()
    assert loss.item() == pytest.approx(lead) and s.grad.isfinite().all()


TEACHER_MASKS = [(0, 0), (1, 1), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3)]  # in the third image all but class 4


@pytest.mark.parametrize("student_masks", [[], [(0, 0), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3)]])
@pytest.mark.parametrize("temperature", [0.5, 1, 4])
def test_masked_classes_contribute_nothing(temperature, student_masks):
    s, t = masked(4, 5, classes=student_masks), masked(4, 5, classes=TEACHER_MASKS, seed=1)
    check_agrees(lambda s, t: kd_loss(s, t, temperature), lambda s, t: naive_kd_loss(s, t, temperature), s, t)
    check_agrees(lambda t, s: kd_loss(s, t, temperature), lambda t, s: naive_kd_loss(s, t, temperature), t, s)
    check_precision(lambda s, t: kd_loss(s, t, temperature), s, t)
    check_precision(lambda t, s: kd_loss(s, t, temperature), t, s)
    assert torch.isfinite(kd_loss(s.half(), t.half(), temperature))


def test_masked_classes_by_hand():
    s, t = torch.tensor([[0, 0, math.log(2)]], requires_grad=True), torch.tensor([[5, 5, -math.inf]])
    loss = kd_loss(s, t, 1)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))  # (1/2, 1/2) against (1/4, 1/4)
    assert s.grad.tolist() == [pytest.approx([-1 / 4, -1 / 4, 1 / 2])]
    assert kd_loss(t, t, 1).item() == 0
    assert kd_loss(t, s, 1).item() == math.inf  # the student excludes a class that the teacher does not
    assert kd_loss(s, torch.full((1, 3), -math.inf), 1).isnan()  # no class left: no distribution


@pytest.mark.parametrize("lead", [200.0, 1e4, 1.5e38])
def test_float32_of_far_masked_logits(lead):
    s = torch.tensor([[lead, -lead, -math.inf, 0]], requires_grad=True)
    t = torch.tensor([[-lead, lead, -math.inf, -math.inf]], requires_grad=True)
    loss = kd_loss(s, t, 1)
    loss.backward()
    assert loss.item() == pytest.approx(2 * lead)
    assert s.grad.tolist() == [[1, -1, 0, 0]] and t.grad.isfinite().all()


def test_refusals():
    with pytest.raises(ValueError, match=r"\(2, 3\) and teacher logits \(2, 4\)"):
        kd_loss(torch.zeros(2, 3), torch.zeros(2, 4), 4)
    with pytest.raises(ValueError, match="positive, it is 0"):
        kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), 0)
