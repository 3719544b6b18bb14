"""NKD against its equation."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from mdistiller.distillers.DKD import dkd_loss
from mdistiller.distillers.NKD import nkd_loss

from .checks import check_agrees, check_precision, normal
from .extremes import check_extremes, log_softmax
from .tensor_rows import check, labels, rows, student_logits, teacher_logits


def naive_nkd_loss(logits_student, logits_teacher, target, temperature, gamma):
    total = logits_student.new_zeros(())
    for z_s, z_t, y in zip(logits_student, logits_teacher, target.tolist()):
        log_p_s, log_p_t = log_softmax(list(z_s)), log_softmax(list(z_t))
        if log_p_t[y].exp() > 0:
            total = total - log_p_t[y].exp() * log_p_s[y]
        others = [c for c in range(len(z_s)) if c != y]
        if any(z_t[c] > -math.inf for c in others):
            log_n_s, log_n_t = (log_softmax([z[c] / temperature for c in others]) for z in (z_s, z_t))
            terms = [t.exp() * s for s, t in zip(log_n_s, log_n_t) if t.exp() > 0]
            total = total - gamma * temperature**2 * sum(terms)
    return total / len(target)


OPTIONS = [(1.0, 1.5), (3.0, 3.5), (0.7, 0.0)]


@pytest.mark.parametrize("batch, classes", [(1, 2), (5, 3), (3, 100)])
@pytest.mark.parametrize("options", OPTIONS)
def test_agrees_with_the_naive_form(batch, classes, options):
    s, t, y = normal(batch, classes), 3 * normal(batch, classes, seed=1), torch.arange(batch) * 7 % classes
    check_agrees(lambda s, t: nkd_loss(s, t, y, *options), lambda s, t: naive_nkd_loss(s, t, y, *options), s, t)


def test_by_hand():
    # Label 0. Teacher (1/2, 1/8, 3/8), student (1/4, 3/8, 3/8): others (1/4, 3/4) and (1/2, 1/2).
    p_t, p_s = (torch.tensor([p], dtype=torch.float64) for p in ((1 / 2, 1 / 8, 3 / 8), (1 / 4, 3 / 8, 3 / 8)))
    target = torch.tensor([0])
    of_target, of_others = 1 / 2 * math.log(4), math.log(2)
    alone = nkd_loss(p_s.log(), p_t.log(), target, 1, 1.5).item()
    assert alone == pytest.approx(of_target + 1.5 * of_others, rel=1e-12)
    # Temperature 2 for the others alone: the logits twice as far apart are (1/16, 9/64, 9/64) / (22/64), and so on.
    p_s_y, p_t_y = 4 / 22, 16 / 26
    doubled = -p_t_y * math.log(p_s_y) + 1.5 * 4 * of_others
    assert nkd_loss(2 * p_s.log(), 2 * p_t.log(), target, 2, 1.5).item() == pytest.approx(doubled, rel=1e-12)


def test_its_second_term_is_that_of_dkd_and_a_constant():
    """-sum n_t log n_s = KL(n_t || n_s) + H(n_t): the same gradient."""
    s, t, y = normal(4, 6).requires_grad_(), normal(4, 6, seed=1), torch.tensor([0, 3, 5, 5])
    ours = nkd_loss(s, t, y, 4.0, 1.0) - nkd_loss(s, t, y, 4.0, 0.0)
    gradients = [torch.autograd.grad(loss, s)[0] for loss in (ours, dkd_loss(s, t, y, 0.0, 1.0, 4.0))]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_two_classes_have_no_second_term():
    s, t, y = normal(2, 2).requires_grad_(), normal(2, 2, seed=1), torch.tensor([0, 1])
    assert nkd_loss(s, t, y, 4.0, 8.0).item() == nkd_loss(s, t, y, 4.0, 0.0).item()


def test_masked_classes_by_hand():
    s, target = torch.zeros(1, 3, requires_grad=True), torch.tensor([0])
    # The teacher leaves the label alone: -log p_s(y), and no second term.
    loss = nkd_loss(s, torch.tensor([[5.0, -math.inf, -math.inf]]), target, 1.0, 1.5)
    assert loss.item() == pytest.approx(math.log(3))
    assert torch.autograd.grad(loss, s)[0].tolist() == [pytest.approx([-2 / 3, 1 / 3, 1 / 3])]
    # The teacher excludes the label: the others alone, log 2.
    loss = nkd_loss(s, torch.tensor([[-math.inf, 0.0, -math.inf]]), target, 1.0, 1.5)
    assert loss.item() == pytest.approx(1.5 * math.log(2))
    # The student excludes a class that the teacher does not.
    assert nkd_loss(torch.tensor([[0.0, -math.inf, 0.0]]), s.detach(), target, 1.0, 1.5).item() == math.inf


@pytest.mark.parametrize("options", OPTIONS[:2])
def test_extremes(options):
    check_extremes(lambda s, t, y: nkd_loss(s, t, y, *options), lambda s, t, y: naive_nkd_loss(s, t, y, *options))


@pytest.mark.parametrize("stand", [False, True])
def test_gradients_and_precision(stand):
    s, t, y = normal(3, 5), normal(3, 5, seed=1), torch.tensor([4, 0, 2])
    check_precision(lambda s, t: nkd_loss(s, t, y, 3.0, 3.5, stand), s, t)
    assert gradcheck(lambda s, t: nkd_loss(s, t, y, 3.0, 3.5, stand), (s.requires_grad_(), t.requires_grad_()))
    temperature = torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda T: nkd_loss(s, t, y, T, 1.5), temperature)


@pytest.mark.parametrize("row", rows("NKD"))
def test_pinned_rows(row):
    seed, student = row["seed"], student_logits(row["seed"])
    options = row["opts"]["TEMPERATURE"], row["opts"]["GAMMA"]
    check(row, lambda: nkd_loss(student, teacher_logits(seed), labels(seed), *options), student=student)


def test_refusals():
    y = torch.tensor([0])
    with pytest.raises(ValueError, match=r"\(1, 3\) and teacher logits \(1, 4\)"):
        nkd_loss(torch.zeros(1, 3), torch.zeros(1, 4), y, 4, 1.5)
    with pytest.raises(ValueError, match="positive, it is -1"):
        nkd_loss(torch.zeros(1, 3), torch.zeros(1, 3), y, -1, 1.5)
    with pytest.raises(ValueError, match="NKD needs two classes or more, the logits have 1"):
        nkd_loss(torch.zeros(1, 1), torch.zeros(1, 1), y, 4, 1.5)
