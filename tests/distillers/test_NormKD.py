"""NormKD against its equations, over KD and over DKD; also where the logits of a network are equal."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from yacs.config import CfgNode as CN

from mdistiller.distillers import NormKD, method_defaults
from mdistiller.distillers.KD import kd_loss
from mdistiller.distillers.NormKD import normkd_dkd_loss, normkd_loss
from mdistiller.models import cifar_model_dict

from .checks import check_agrees, check_precision, normal
from .extremes import EQUAL, check_extremes, check_finite, kl, log_softmax
from .tensor_rows import check, labels, rows, student_logits, teacher_logits


def temperature(row, norm):
    """norm * std of a list of logits; 0 if they are equal."""
    row = [z for z in row if z > -math.inf]
    if len({z.item() for z in row}) == 1:
        return 0.0
    mean = sum(row) / len(row)
    return norm * (sum((z - mean) ** 2 for z in row) / (len(row) - 1)) ** 0.5


def scaled(row, own):
    """z / T; zeros where T is 0."""
    zero = torch.zeros((), dtype=torch.float64)
    return [z / own if own else zero.masked_fill(z == -math.inf, -math.inf) for z in row]


def naive_normkd_loss(logits_student, logits_teacher, norm):
    total = 0 * logits_student.clamp(min=0).sum()
    for z_s, z_t in zip(logits_student, logits_teacher):
        own = temperature(z_t, norm)
        log_s, log_t = log_softmax(scaled(z_s, temperature(z_s, norm))), log_softmax(scaled(z_t, own))
        total = total + own**2 * kl(log_t, log_s)
    return total / len(logits_student)


def naive_normkd_dkd_loss(logits_student, logits_teacher, target, alpha, beta, norm):
    total = 0 * logits_student.clamp(min=0).sum()
    for z_s, z_t, y in zip(logits_student, logits_teacher, target.tolist()):
        own = temperature(z_t, norm)
        rows_of = scaled(z_s, temperature(z_s, norm)), scaled(z_t, own)
        others = [[*row[:y], *row[y + 1 :]] for row in rows_of]
        binary = [[row[y], torch.logsumexp(torch.stack(rest), dim=0)] for row, rest in zip(rows_of, others)]
        tckd = kl(log_softmax(binary[1]), log_softmax(binary[0]))
        possible = any(z > -math.inf for z in others[1])
        nckd = kl(log_softmax(others[1]), log_softmax(others[0])) if possible else 0.0
        total = total + own**2 * (alpha * tckd + beta * nckd)
    return total / len(target)


@pytest.mark.parametrize("batch, classes, norm", [(1, 2, 2.0), (5, 7, 1.0), (3, 100, 0.5)])
def test_agrees_with_the_naive_form(batch, classes, norm):
    s, t, y = normal(batch, classes), 3 * normal(batch, classes, seed=1), torch.arange(batch) * 7 % classes
    check_agrees(lambda s, t: normkd_loss(s, t, norm), lambda s, t: naive_normkd_loss(s, t, norm), s, t)
    rest = y, 4.0, 5.0, norm
    check_agrees(lambda s, t: normkd_dkd_loss(s, t, *rest), lambda s, t: naive_normkd_dkd_loss(s, t, *rest), s, t)


def test_by_hand():
    # Deviations: student (0, 1, 2) 1, teacher (0, 4, 8) 4. At norm 1 / log 2, e^(z / T) is 2^z and 2^(z / 4).
    s, t = (torch.tensor([row], dtype=torch.float64) for row in ((0.0, 1, 2), (8.0, 4, 0)))
    p_s, p_t = (1 / 7, 2 / 7, 4 / 7), (4 / 7, 2 / 7, 1 / 7)
    divergence = sum(a * math.log(a / b) for a, b in zip(p_t, p_s))
    assert normkd_loss(s, t, 1 / math.log(2)).item() == pytest.approx((4 / math.log(2)) ** 2 * divergence, rel=1e-12)
    assert normkd_loss(3 * s + 5, 3 * s, 2.0).item() == pytest.approx(0, abs=1e-12)
    # Label 0: (4/7, 3/7) against (1/7, 6/7), and (2/3, 1/3) against (1/3, 2/3).
    tckd = 4 / 7 * math.log(4) + 3 / 7 * math.log(1 / 2)
    nckd = 2 / 3 * math.log(2) + 1 / 3 * math.log(1 / 2)
    loss = normkd_dkd_loss(s, t, torch.tensor([0]), 3.0, 5.0, 1 / math.log(2)).item()
    assert loss == pytest.approx((4 / math.log(2)) ** 2 * (3 * tckd + 5 * nckd), rel=1e-12)


def test_standardised_kd_is_the_same_but_for_the_factor():
    s, t = normal(1, 9), 3 * normal(1, 9, seed=1)
    standardized = kd_loss(s, t, 2.0, logit_stand=True).item()
    assert normkd_loss(s, t, 2.0).item() == pytest.approx(t.std().item() ** 2 * standardized, rel=1e-6)


def test_extremes():
    check_extremes(lambda s, t, y: normkd_loss(s, t, 2.0), lambda s, t, y: naive_normkd_loss(s, t, 2.0))
    rest = 4.0, 5.0, 2.0
    check_extremes(lambda *x: normkd_dkd_loss(*x, *rest), lambda *x: naive_normkd_dkd_loss(*x, *rest))


def test_equal_logits_by_hand():
    """Of the student: a uniform prediction without gradient. Of the teacher: no weight."""
    s, t, _ = EQUAL["an undecided student"]
    leaf = s[:1].float().requires_grad_()
    loss = normkd_loss(leaf, t[:1], 2.0)
    loss.backward()
    deviation = 2 * t[0].std().item()
    p = (t[0] / deviation).softmax(0)
    assert loss.item() == pytest.approx(deviation**2 * (p * (5 * p).log()).sum().item(), rel=1e-5)
    assert leaf.grad.eq(0).all()
    leaf = t[:1].float().requires_grad_()
    loss = normkd_loss(leaf, s[:1].float(), 2.0)
    loss.backward()
    assert loss.item() == 0 and leaf.grad.eq(0).all()


def test_float32_of_large_and_far_off_logits():
    s, t = 1e4 + normal(3, 5), -1e4 + normal(3, 5, seed=1)
    check_finite(lambda s, t, y: normkd_loss(s, t, 2.0), s, t, torch.zeros(3))
    rounded = s.float(), t.float()
    exact = naive_normkd_loss(*(x.double() for x in rounded), 2.0).item()
    assert normkd_loss(*rounded, 2.0).item() == pytest.approx(exact, rel=1e-5)


def test_gradients_and_precision():
    s, t, y = normal(3, 5), normal(3, 5, seed=1), torch.tensor([4, 0, 2])
    for loss in (lambda s, t: normkd_loss(s, t, 2.0), lambda s, t: normkd_dkd_loss(s, t, y, 4.0, 5.0, 2.0)):
        check_precision(loss, s.detach(), t.detach())
        assert gradcheck(loss, (s.requires_grad_(), t.requires_grad_()))


@pytest.mark.parametrize("row", rows("NormKD"))
def test_pinned_rows(row):
    student, norm = student_logits(row["seed"]), row["opts"]["TEMPERATURE_NORM"]
    check(row, lambda: normkd_loss(student, teacher_logits(row["seed"]), norm), student=student)


@pytest.mark.parametrize("row", rows("NormKD+DKD"))
def test_pinned_rows_over_dkd(row):
    seed, student = row["seed"], student_logits(row["seed"])
    options = [row["opts"][key] for key in ("ALPHA", "BETA", "TEMPERATURE_NORM")]
    check(row, lambda: normkd_dkd_loss(student, teacher_logits(seed), labels(seed), *options), student=student)


@pytest.mark.parametrize("epoch, scale", [(1, 0.05), (20, 1), (torch.tensor(10), 0.5)])
def test_a_key_switches_to_dkd(epoch, scale):
    torch.manual_seed(0)
    nets = [cifar_model_dict["resnet8"][0](num_classes=10) for _ in range(2)]
    batch = {"image": torch.randn(2, 3, 32, 32), "target": torch.tensor([3, 4]), "epoch": epoch}
    cfg = CN({"NormKD": method_defaults["NormKD"].clone()})
    over_kd = NormKD(*nets, cfg).train()
    assert not over_kd.reads_labels and NormKD.label_weights(cfg) == ("NormKD.LOSS.CE_WEIGHT",)
    logits, losses = over_kd(**batch)
    taught = over_kd.teacher_forward(batch["image"])[0]
    assert losses["loss_kd"].item() == pytest.approx(0.9 * normkd_loss(logits, taught, 2.0).item(), rel=1e-6)

    cfg.NormKD.DKD = True
    over_dkd = NormKD(*nets, cfg).train()
    assert over_dkd.reads_labels and NormKD.label_weights(cfg) is None
    again, of_dkd = over_dkd(**batch)
    assert torch.equal(again, logits)
    by_hand = normkd_dkd_loss(logits, taught, batch["target"], 4.0, 5.0, 2.0)
    assert of_dkd["loss_kd"].item() == pytest.approx(0.9 * scale * by_hand.item(), rel=1e-6)
    assert of_dkd["loss_ce"].item() == pytest.approx(losses["loss_ce"].item(), rel=1e-6)


def test_refusals():
    y = torch.tensor([0, 0])
    with pytest.raises(ValueError, match=r"\(2, 3\) and teacher logits \(2, 4\)"):
        normkd_loss(torch.zeros(2, 3), torch.zeros(2, 4), 2.0)
    with pytest.raises(ValueError, match="positive, it is 0"):
        normkd_loss(torch.zeros(2, 3), torch.zeros(2, 3), 0)
    with pytest.raises(ValueError, match="NormKD over DKD needs two classes or more"):
        normkd_dkd_loss(torch.zeros(2, 1), torch.zeros(2, 1), y, 4.0, 5.0, 2.0)
