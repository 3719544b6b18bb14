"""The alpha-beta divergence against its definition, at its limits, and where the usual form cancels."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from mdistiller.distillers.ABKD import ab_divergence
from mdistiller.distillers.KD import kd_loss

from . import tensor_rows
from .checks import check_agrees, check_precision, masked, normal

LIMITS = [(1, 0), (0, 1), (0, 0), (0.5, -0.5), (-0.3, 0.3), (0.7, 0), (0, 0.4), (-0.5, 1.5)]


def naive_term(p, q, a, b):
    """One class's addend, from the definition and its limits by l'Hopital."""
    if a and b and a + b:
        c = a + b
        return -1 / (a * b) * (p**a * q**b - a / c * p**c - b / c * q**c)
    ratio = torch.log(q / p)
    if a and b:  # b = -a
        return (p**a * q**-a - 1 + a * ratio) / a**2
    if a:
        return (q**a - p**a + p**a * torch.log(p**a / q**a)) / a**2
    if b:
        return (p**b - q**b + q**b * torch.log(q**b / p**b)) / b**2
    return ratio**2 / 2


def naive_divergence(logits_student, logits_teacher, a, b, temperature):
    total = logits_student.new_zeros(())
    for s, t in zip(logits_student, logits_teacher):
        q, p = torch.softmax(s / temperature, dim=0), torch.softmax(t / temperature, dim=0)
        for i in range(len(p)):
            total = total + naive_term(p[i], q[i], a, b)
    return total / len(logits_student)


@pytest.mark.parametrize("row", tensor_rows.rows("ABKD"))
def test_rows(row):
    opts, seed = row["opts"], row["seed"]
    s, t = tensor_rows.student_logits(seed), tensor_rows.teacher_logits(seed)
    tensor_rows.check(row, lambda: ab_divergence(s, t, opts["ALPHA"], opts["BETA"], opts["T"]), student=s)


@pytest.mark.parametrize("a, b", [(0.8, 0.3), (0.2, 0.9), (0.5, 0.5), (1, 1), (2, -0.5), (3.0, 0.1), *LIMITS])
@pytest.mark.parametrize("batch, classes, temperature", [(1, 1, 4), (1, 2, 1.0), (3, 20, 4)])
def test_agrees_with_the_naive_form(a, b, batch, classes, temperature):
    logits, rest = (normal(batch, classes), 2 * normal(batch, classes, seed=1)), (a, b, temperature)
    check_agrees(lambda s, t: ab_divergence(s, t, *rest), lambda s, t: naive_divergence(s, t, *rest), *logits)


def test_by_hand():
    # Teacher (3/4, 1/4), student (1/2, 1/2).
    s, t = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[0.75, 0.25]], dtype=torch.float64).log()
    kl = 3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2)
    reverse = 1 / 2 * math.log(2 / 3) + 1 / 2 * math.log(2)
    hellinger = 2 * ((math.sqrt(3 / 4) - math.sqrt(1 / 2)) ** 2 + (1 / 2 - math.sqrt(1 / 2)) ** 2)
    for (a, b), expected in {
        (1, 0): kl, (0, 1): reverse, (0.5, 0.5): hellinger, (1, 1): 1 / 2 * (1 / 16 + 1 / 16),
        (0, 0): (math.log(3 / 2) ** 2 + math.log(2) ** 2) / 2,
    }.items():  # fmt: skip
        assert ab_divergence(s, t, a, b, 1).item() == pytest.approx(expected, rel=1e-12), (a, b)
        assert ab_divergence(t, t, a, b, 1).item() == 0


@pytest.mark.parametrize("temperature", [1, 4])
def test_kl_is_its_limit(temperature):
    s, t = normal(4, 10), 3 * normal(4, 10, seed=1)
    kl = kd_loss(s, t, temperature).item() / temperature**2
    assert ab_divergence(s, t, 1, 0, temperature).item() == pytest.approx(kl, rel=1e-12)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("step", [1e-3, 1e-6, 1e-9, 1e-12])
def test_continuous_at_the_limits(limit, step):
    """Nothing cancels for small a, b or a + b, in float32 neither."""
    s, t = normal(3, 6), 2 * normal(3, 6, seed=1)
    exact = ab_divergence(s, t, *limit, 1).item()
    for da, db in ((step, 0), (0, step), (step, step), (-step, step / 2)):
        close = limit[0] + da, limit[1] + db
        assert ab_divergence(s, t, *close, 1).item() == pytest.approx(exact, rel=30 * step + 1e-9)
        assert ab_divergence(s.float(), t.float(), *close, 1).item() == pytest.approx(exact, rel=30 * step + 2e-4)


@pytest.mark.parametrize("shift", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("a, b", [(0.8, 0.3), (1, 0), (0.5, 0.5), (0.3, 1.2)])
def test_nothing_cancels_where_the_predictions_are_close(a, b, shift):
    """Second order: sum_C p^(a + b) d^2 / 2."""
    t = normal(2, 6)
    s = t + shift * normal(2, 6, seed=1)
    d = s.log_softmax(dim=1) - t.log_softmax(dim=1)
    second = (t.softmax(dim=1) ** (a + b) * d.square()).sum(dim=1).mean().item() / 2
    assert ab_divergence(s, t, a, b, 1).item() == pytest.approx(second, rel=3 * shift + 1e-8)


@pytest.mark.parametrize("a, b", [(0.8, 0.3), (0.2, 0.9), *LIMITS])
def test_gradients(a, b):
    s, t = normal(3, 5).requires_grad_(), normal(3, 5, seed=1).requires_grad_()
    assert gradcheck(lambda s, t: ab_divergence(s, t, a, b, 4), (s, t))


@pytest.mark.parametrize("a, b", [(0.8, 0.3), (0.2, 0.9), (1, 0), (0, 1)])
def test_precision_and_standardised_logits(a, b):
    s, t = normal(3, 5), normal(3, 5, seed=1)
    check_precision(lambda s, t: ab_divergence(s, t, a, b, 4), s, t)
    assert ab_divergence(s, t, a, b, 4).item() != pytest.approx(ab_divergence(s, t, a, b, 4, True).item(), rel=1e-3)


@pytest.mark.parametrize("lead", [200.0, 1e4])
@pytest.mark.parametrize("a, b", [(0.8, 0.3), (0.2, 0.9), (1e-6, 1e-7), *[(a, b) for a, b in LIMITS if min(a, b) >= 0]])
def test_finite_for_a_large_logit(a, b, lead):
    s = torch.zeros(2, 3)
    s[:, 0] = lead
    for student, teacher in ((s, s.flip(1)), (s, 0 * s), (0 * s, s), (s, s)):
        student, teacher = student.clone().requires_grad_(), teacher.clone().requires_grad_()
        loss = ab_divergence(student, teacher, a, b, 1)
        loss.backward()
        assert loss.isfinite() and student.grad.isfinite().all() and teacher.grad.isfinite().all()
    if (a, b) in ((1, 0), (0, 1)):
        assert ab_divergence(s, s.flip(1), a, b, 1).item() == pytest.approx(lead)


@pytest.mark.parametrize("a, b", [(0.8, 0.3), (0.9, 0.0), (1, 0), (0.2, 0.9)])
def test_classes_that_the_teacher_masks_out(a, b):
    """p = 0: the addend is q^(a + b) / (a (a + b)), the limit of the definition's for p to 0."""
    s, t = normal(3, 5).requires_grad_(), masked(3, 5, classes=[(0, 0), (1, 1), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3)])
    loss = ab_divergence(s, t, a, b, 1)
    p, q = t.softmax(dim=1), s.softmax(dim=1)
    naive = sum(
        naive_term(p[i, c], q[i, c], a, b) if p[i, c] > 0 else q[i, c] ** (a + b) / (a * (a + b))
        for i in range(3)
        for c in range(5)
    )
    assert loss.item() == pytest.approx(naive.item() / 3, rel=1e-9)
    ours, theirs = (torch.autograd.grad(value, s)[0] for value in (loss, naive / 3))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    if (a, b) == (1, 0):
        assert loss.item() == pytest.approx(kd_loss(s, t, 1).item(), rel=1e-9)


def test_refusals():
    with pytest.raises(ValueError, match=r"\(2, 3\) and teacher logits \(2, 4\)"):
        ab_divergence(torch.zeros(2, 3), torch.zeros(2, 4), 1, 0, 4)
    with pytest.raises(ValueError, match="positive, it is 0"):
        ab_divergence(torch.zeros(2, 3), torch.zeros(2, 3), 1, 0, 0)
