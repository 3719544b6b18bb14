"""WTTM against powers and sums."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from mdistiller.distillers.TTM import ttm_loss
from mdistiller.distillers.WTTM import wttm_loss

from .checks import check_agrees, check_precision, normal
from .extremes import check_extremes, kl, log_softmax
from .tensor_rows import check, rows, student_logits, teacher_logits


def naive_wttm_loss(logits_student, logits_teacher, gamma):
    total = logits_student.new_zeros(())
    for z_s, z_t in zip(logits_student, logits_teacher):
        weight = sum(log_p.exp() ** gamma for log_p in log_softmax(list(z_t)) if log_p > -math.inf)
        total = total + weight * kl(log_softmax([gamma * z for z in z_t]), log_softmax(list(z_s)))
    return total / len(logits_student)


@pytest.mark.parametrize("batch, classes, gamma", [(1, 1, 0.1), (1, 2, 0.1), (5, 7, 0.3), (3, 100, 1.0), (4, 10, 2.0)])
def test_agrees_with_the_naive_form(batch, classes, gamma):
    logits = normal(batch, classes), 3 * normal(batch, classes, seed=1)
    check_agrees(lambda s, t: wttm_loss(s, t, gamma), lambda s, t: naive_wttm_loss(s, t, gamma), *logits)


def test_by_hand():
    # Teacher (16/17, 1/17) to the power 1/4: (2, 1) / 17^(1/4). Student (1/2, 1/2).
    t = torch.tensor([[16.0, 1.0]], dtype=torch.float64).log()
    divergence = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    s = torch.zeros(1, 2, dtype=torch.float64)
    assert wttm_loss(s, t, 0.25).item() == pytest.approx(3 / 17**0.25 * divergence, rel=1e-12)


def test_the_weight_is_from_1_to_63():
    """Of 100 classes at the power 0.1: 1 for a certain teacher, 100^0.9 for a uniform one."""
    s = normal(1, 100)
    uniform, certain = torch.zeros(1, 100), torch.full((1, 100), -math.inf)
    certain[0, 3] = 0
    for t, weight in ((uniform.double(), 100**0.9), (certain.double(), 1)):
        assert wttm_loss(s, t, 0.1).item() == pytest.approx(weight * ttm_loss(s, t, 0.1).item(), rel=1e-12)


def test_powers_do_not_underflow():
    """p_t is e^-150, which is 0 in float32; its power 0.1 is e^-15."""
    s, t = torch.zeros(1, 2), torch.tensor([[150.0, 0.0]])
    q = math.exp(-15) / (1 + math.exp(-15))
    divergence = (1 - q) * math.log(2 * (1 - q)) + q * math.log(2 * q)
    assert wttm_loss(s, t, 0.1).item() == pytest.approx((1 + math.exp(-15)) * divergence, rel=1e-6)
    assert wttm_loss(s.half(), t.half(), 0.1).item() == pytest.approx((1 + math.exp(-15)) * divergence, rel=1e-6)


def test_extremes():
    check_extremes(lambda s, t, y: wttm_loss(s, t, 0.1), lambda s, t, y: naive_wttm_loss(s, t, 0.1))


@pytest.mark.parametrize("stand", [False, True])
def test_gradients_and_precision(stand):
    s, t = normal(3, 5), normal(3, 5, seed=1)
    check_precision(lambda s, t: wttm_loss(s, t, 0.2, stand), s, t)
    assert gradcheck(lambda s, t: wttm_loss(s, t, 0.2, stand), (s.requires_grad_(), t.requires_grad_()))


@pytest.mark.parametrize("row", rows("WTTM"))
def test_pinned_rows(row):
    student = student_logits(row["seed"])
    check(row, lambda: wttm_loss(student, teacher_logits(row["seed"]), row["opts"]["GAMMA"]), student=student)


def test_refusals():
    with pytest.raises(ValueError, match=r"\(2, 3\) and teacher logits \(2, 4\)"):
        wttm_loss(torch.zeros(2, 3), torch.zeros(2, 4), 0.1)
    with pytest.raises(ValueError, match="gamma must be positive, it is -1"):
        wttm_loss(torch.zeros(2, 3), torch.zeros(2, 3), -1)
