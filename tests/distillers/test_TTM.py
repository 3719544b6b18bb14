"""TTM and its loss against powers and sums."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from mdistiller.distillers.TTM import ttm_loss

from .checks import check_agrees, check_precision, normal
from .extremes import check_extremes, kl, log_softmax
from .tensor_rows import check, rows, student_logits, teacher_logits


def naive_ttm_loss(logits_student, logits_teacher, gamma):
    total = logits_student.new_zeros(())
    for z_s, z_t in zip(logits_student, logits_teacher):
        total = total + kl(log_softmax([gamma * z for z in z_t]), log_softmax(list(z_s)))
    return total / len(logits_student)


def of_powers(p_s, p_t, gamma):
    """For one image, from probabilities."""
    powers = [p**gamma for p in p_t]
    q = [power / sum(powers) for power in powers]
    return sum(a * math.log(a / b) for a, b in zip(q, p_s))


def test_naive_form_is_that_of_powers():
    s, t = normal(1, 5), 3 * normal(1, 5, seed=1)
    p_s, p_t = (z.softmax(dim=1)[0].tolist() for z in (s, t))
    assert naive_ttm_loss(s, t, 0.3).item() == pytest.approx(of_powers(p_s, p_t, 0.3), rel=1e-12)


@pytest.mark.parametrize("batch, classes, gamma", [(1, 1, 0.1), (1, 2, 0.1), (5, 7, 0.3), (3, 100, 1.0), (4, 10, 2.0)])
def test_agrees_with_the_naive_form(batch, classes, gamma):
    logits = normal(batch, classes), 3 * normal(batch, classes, seed=1)
    check_agrees(lambda s, t: ttm_loss(s, t, gamma), lambda s, t: naive_ttm_loss(s, t, gamma), *logits)


def test_by_hand():
    # Teacher (16/17, 1/17) to the power 1/4: (2, 1) in proportion. Student (1/2, 1/2).
    t = torch.tensor([[16.0, 1.0]], dtype=torch.float64).log()
    expected = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    assert ttm_loss(torch.zeros(1, 2, dtype=torch.float64), t, 0.25).item() == pytest.approx(expected, rel=1e-12)
    assert ttm_loss(t / 4, t, 0.25).item() == pytest.approx(0, abs=1e-15)  # the student is not softened


def test_extremes():
    check_extremes(lambda s, t, y: ttm_loss(s, t, 0.1), lambda s, t, y: naive_ttm_loss(s, t, 0.1))


@pytest.mark.parametrize("stand", [False, True])
def test_gradients_and_precision(stand):
    s, t = normal(3, 5), normal(3, 5, seed=1)
    check_precision(lambda s, t: ttm_loss(s, t, 0.2, stand), s, t)
    assert gradcheck(lambda s, t: ttm_loss(s, t, 0.2, stand), (s.requires_grad_(), t.requires_grad_()))


@pytest.mark.parametrize("row", rows("TTM"))
def test_pinned_rows(row):
    student = student_logits(row["seed"])
    check(row, lambda: ttm_loss(student, teacher_logits(row["seed"]), row["opts"]["GAMMA"]), student=student)


def test_refusals():
    with pytest.raises(ValueError, match=r"\(2, 3\) and teacher logits \(2, 4\)"):
        ttm_loss(torch.zeros(2, 3), torch.zeros(2, 4), 0.1)
    with pytest.raises(ValueError, match="gamma must be positive, it is 0"):
        ttm_loss(torch.zeros(2, 3), torch.zeros(2, 3), 0)
