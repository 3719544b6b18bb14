"""LDRLD against its definition: loops over images, pairs of positions, and classes."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from mdistiller.distillers.KD import kd_loss
from mdistiller.distillers.LDRLD import ldrld_loss

from . import tensor_rows
from .checks import check_agrees, check_precision, masked, normal
from .oracles.dkd import naive_kl


def naive_kl_over(s, t, classes, temperature):
    classes = list(classes)
    if not classes or all(t[c] == -math.inf for c in classes):
        return 0.0
    p_s, p_t = (torch.softmax(z[classes] / temperature, dim=0) for z in (s, t))
    return naive_kl(p_t, p_s)


def naive_ldrld_loss(logits_student, logits_teacher, k, alpha, beta, temperature):
    total = logits_student.new_zeros(())
    for s, t in zip(logits_student, logits_teacher):
        order = sorted(range(len(s)), key=lambda c: (-s[c].item(), c))
        top, rest = order[:k], order[k:]
        local, count = naive_kl_over(s, t, top, temperature), 1
        for a in range(len(top)):
            for b in range(a + 1, len(top)):
                weight = 2 * math.exp(-0.05 * (a + b + 2)) / (1.5 + b - a)
                local = local + weight * naive_kl_over(s, t, (top[a], top[b]), temperature)
                count += 1
        total = total + alpha * local / count + beta * naive_kl_over(s, t, rest, temperature)
    return temperature**2 * total / len(logits_student)


@pytest.mark.parametrize("row", tensor_rows.rows("LDRLD"))
def test_rows(row):
    opts, seed = row["opts"], row["seed"]
    s, t = tensor_rows.student_logits(seed), tensor_rows.teacher_logits(seed)
    rest = opts["K"], opts["ALPHA"], opts["BETA"], opts["T"]
    ce = torch.nn.functional.cross_entropy
    loss = lambda: opts["CE_WEIGHT"] * ce(s, tensor_rows.labels(seed)) + ldrld_loss(s, t, *rest)  # noqa: E731
    tensor_rows.check(row, loss, student=s)


@pytest.mark.parametrize(
    "batch, classes, k, temperature",
    [(1, 1, 7, 4.0), (1, 2, 7, 4.0), (3, 2, 1, 1.0), (4, 8, 7, 4.0), (3, 7, 7, 2.0), (2, 20, 7, 0.7), (2, 20, 3, 4.0)],
)
def test_agrees_with_the_naive_form(batch, classes, k, temperature):
    logits, rest = (normal(batch, classes), 3 * normal(batch, classes, seed=1)), (k, 10.5, 7.0, temperature)
    check_agrees(lambda s, t: ldrld_loss(s, t, *rest), lambda s, t: naive_ldrld_loss(s, t, *rest), *logits)


def test_by_hand():
    # The student prefers class 1, then 0. Teacher (3/4, 1/4) over the two, student (1/3, 2/3); class 2 is the rest.
    s = torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.float64).log()
    t = torch.tensor([[3.0, 1.0, 9.0]], dtype=torch.float64).log()
    kl = 3 / 4 * math.log(9 / 4) + 1 / 4 * math.log(3 / 8)
    weight = 2 * math.exp(-0.05 * 3) / 2.5  # positions 0 and 1
    assert ldrld_loss(s, t, 2, 10.0, 7.0, 1.0).item() == pytest.approx(10 * (weight + 1) * kl / 2, rel=1e-12)
    # Position 0 alone: no pair, and the rest is {0, 2} with (1/4, 3/4) against (2/3, 1/3).
    rest = 1 / 4 * math.log(3 / 8) + 3 / 4 * math.log(9 / 4)
    assert ldrld_loss(s, t, 1, 10.0, 7.0, 1.0).item() == pytest.approx(7 * rest, rel=1e-12)
    assert ldrld_loss(s, s, 2, 10.0, 7.0, 1.0).item() == pytest.approx(0, abs=1e-12)


def test_the_rest_alone_is_kd_of_the_other_classes():
    s, t = normal(1, 9), normal(1, 9, seed=1)
    rest = s[0].argsort(descending=True)[3:]
    expected = kd_loss(s[:, rest], t[:, rest], 4.0).item()
    assert ldrld_loss(s, t, 3, 0.0, 1.0, 4.0).item() == pytest.approx(expected, rel=1e-12)


def test_equal_logits_are_ranked_by_class():
    t = normal(2, 6, seed=1)
    loss = ldrld_loss(torch.zeros(2, 6, dtype=torch.float64), t, 3, 1.0, 1.0, 1.0).item()
    assert loss == pytest.approx(naive_ldrld_loss(torch.zeros(2, 6), t, 3, 1.0, 1.0, 1.0).item(), rel=1e-6)


def test_gradients_and_precision():
    s, t = normal(3, 9).requires_grad_(), normal(3, 9, seed=1).requires_grad_()
    assert gradcheck(lambda s, t: ldrld_loss(s, t, 4, 10.5, 7.0, 4.0), (s, t))
    # Without ties: bfloat16 may rank two close logits in another order.
    spread = torch.arange(27, dtype=torch.float64)[torch.randperm(27, generator=torch.Generator().manual_seed(0))]
    check_precision(lambda s, t: ldrld_loss(s, t, 4, 10.5, 7.0, 4.0), spread.reshape(3, 9) / 4, t.detach())
    plain, stand = (ldrld_loss(s, t, 4, 10.5, 7.0, 4.0, flag).item() for flag in (False, True))
    assert plain != pytest.approx(stand, rel=1e-3)


@pytest.mark.parametrize("classes", [2, 3, 20])
@pytest.mark.parametrize("lead", [0.0, 200.0, 1e4])
def test_finite_for_a_large_logit(lead, classes):
    s = torch.zeros(1, classes)
    s[:, 0] = lead
    for student, teacher in ((s, s.flip(1)), (s.flip(1), s), (s, 0 * s), (0 * s, s)):
        student = student.clone().requires_grad_()
        loss = ldrld_loss(student, teacher, 7, 10.5, 7.0, 1.0)
        loss.backward()
        assert loss.isfinite() and student.grad.isfinite().all()


def test_masked_classes_contribute_nothing():
    # Of the second image only one class is left; in the third a pair, and the whole rest, are masked out.
    places = [(0, 0), (0, 3), *((1, c) for c in range(5))]
    s = normal(3, 6)
    third = s[2].argsort(descending=True).tolist()
    t = masked(3, 6, classes=[*places, *((2, third[i]) for i in (0, 1, 3, 4, 5))], seed=1)
    rest = 3, 10.5, 7.0, 4.0
    check_agrees(lambda s, t: ldrld_loss(s, t, *rest), lambda s, t: naive_ldrld_loss(s, t, *rest), s, t)
    t.requires_grad_()
    ldrld_loss(s, t, *rest).backward()
    assert t.grad.isfinite().all()


def test_refusals():
    with pytest.raises(ValueError, match=r"\(2, 3\) and teacher logits \(2, 4\)"):
        ldrld_loss(torch.zeros(2, 3), torch.zeros(2, 4), 7, 1, 1, 4)
    with pytest.raises(ValueError, match="positive, it is 0"):
        ldrld_loss(torch.zeros(2, 3), torch.zeros(2, 3), 7, 1, 1, 0)
