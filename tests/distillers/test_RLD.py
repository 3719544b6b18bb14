"""RLD against its equations: what it leaves out, and what is left where that is nothing."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from yacs.config import CfgNode as CN

from mdistiller.distillers import RLD, method_defaults
from mdistiller.distillers.RLD import rld_loss
from mdistiller.models import cifar_model_dict

from .checks import check_agrees, check_precision, normal
from .extremes import check_extremes, kl, log_softmax
from .tensor_rows import check, labels, rows, student_logits, teacher_logits


def naive_rld_loss(logits_student, logits_teacher, target, alpha, beta, temperature, alpha_temperature):
    total = logits_student.new_zeros(())
    for z_s, z_t, y in zip(logits_student, logits_teacher, target.tolist()):
        pairs = []
        for z, one in ((z_s, y), (z_t, max(range(len(z_t)), key=lambda c: z_t[c].item()))):
            log_p = log_softmax([x / alpha_temperature for x in z])
            pairs.append([log_p[one], torch.logsumexp(torch.stack([*log_p[:one], *log_p[one + 1 :]]), dim=0)])
        total = total + alpha * alpha_temperature**2 * kl(pairs[1], pairs[0])
        kept = [c for c in range(len(z_t)) if z_t[c] < z_t[y]]
        if any(z_t[c] > -math.inf for c in kept):
            log_q_s, log_q_t = (log_softmax([z[c] / temperature for c in kept]) for z in (z_s, z_t))
            total = total + beta * temperature**2 * kl(log_q_t, log_q_s)
    return total / len(target)


OPTIONS = [(1.0, 8.0, 4.0, 1.0), (0.5, 2.0, 1.0, 4.0), (1, 0, 4, 4), (0, 1, 0.7, 1)]


@pytest.mark.parametrize("batch, classes", [(1, 2), (5, 3), (6, 30)])
@pytest.mark.parametrize("options", OPTIONS)
def test_agrees_with_the_naive_form(batch, classes, options):
    s, t, y = normal(batch, classes), 3 * normal(batch, classes, seed=1), torch.arange(batch) * 7 % classes
    # In the even images the teacher is right.
    t[::2] = t[::2].scatter(1, y[::2, None], t[::2].amax(dim=1, keepdim=True) + 1)
    check_agrees(lambda s, t: rld_loss(s, t, y, *options), lambda s, t: naive_rld_loss(s, t, y, *options), s, t)


def test_by_hand():
    # Label 0. Teacher (1/4, 1/2, 1/8, 1/8): the wrong class 1 is ahead. Student (1/8, 1/8, 1/4, 1/2).
    p_t = torch.tensor([[1 / 4, 1 / 2, 1 / 8, 1 / 8]], dtype=torch.float64)
    p_s = torch.tensor([[1 / 8, 1 / 8, 1 / 4, 1 / 2]], dtype=torch.float64)
    target = torch.tensor([0])
    scd = 1 / 2 * math.log(4) + 1 / 2 * math.log(4 / 7)  # (1/2, 1/2) against (1/8, 7/8)
    mcd = 1 / 2 * math.log(3 / 2) + 1 / 2 * math.log(3 / 4)  # (1/2, 1/2) against (1/3, 2/3): of classes 2 and 3
    assert rld_loss(p_s.log(), p_t.log(), target, 1, 0, 9, 1).item() == pytest.approx(scd, rel=1e-12)
    assert rld_loss(p_s.log(), p_t.log(), target, 0, 1, 1, 9).item() == pytest.approx(mcd, rel=1e-12)
    both = rld_loss(2 * p_s.log(), 2 * p_t.log(), target, 3, 5, 2, 2).item()
    assert both == pytest.approx(4 * (3 * scd + 5 * mcd), rel=1e-12)
    # The teacher is right, and level in classes 0 and 1: the tie is left out as the label is.
    level = torch.tensor([[3.0, 3.0, 1.0, 1.0]], dtype=torch.float64)
    assert rld_loss(p_s.log(), level, target, 0, 1, 1, 1).item() == pytest.approx(mcd, rel=1e-12)


@pytest.mark.parametrize("row", [[0.0, 1.0, 2.0], [1.0, 1.0, 1.0], [-math.inf, 1.0, 2.0], [1.0, -math.inf, -math.inf]])
def test_nothing_is_left(row):
    """The label is the teacher's smallest class, or all that it leaves: no second term, and no gradient of it."""
    s, t = normal(1, 3).requires_grad_(), torch.tensor([row], dtype=torch.float64, requires_grad=True)
    loss = rld_loss(s, t, torch.tensor([0]), 0.0, 8.0, 4.0, 1.0)
    loss.backward()
    assert loss.item() == 0 and s.grad.eq(0).all() and t.grad.eq(0).all()


def test_a_saturated_student_by_hand():
    """Where the form with log(1 - q) is -inf and its gradient NaN."""
    s = torch.tensor([[1e4, 0.0, 0.0]], requires_grad=True)
    t = torch.tensor([[0.0, math.log(2), -math.inf]])
    loss = rld_loss(s, t, torch.tensor([0]), 1.0, 0.0, 4.0, 1.0)
    loss.backward()
    # b_t = (2/3, 1/3); log b_s = (0, log(2) - 1e4).
    expected = 2 / 3 * math.log(2 / 3) + 1 / 3 * (math.log(1 / 3) - math.log(2) + 1e4)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert s.grad.tolist() == [pytest.approx([1 / 3, -1 / 6, -1 / 6])]


@pytest.mark.parametrize("options", OPTIONS[:2])
def test_extremes(options):
    check_extremes(lambda s, t, y: rld_loss(s, t, y, *options), lambda s, t, y: naive_rld_loss(s, t, y, *options))


@pytest.mark.parametrize("stand", [False, True])
def test_gradients_and_precision(stand):
    s, t, y = normal(3, 5), normal(3, 5, seed=1), torch.tensor([4, 0, 2])
    rest = y, 1.0, 8.0, 4.0, 2.0, stand
    check_precision(lambda s, t: rld_loss(s, t, *rest), s, t)
    assert gradcheck(lambda s, t: rld_loss(s, t, *rest), (s.requires_grad_(), t.requires_grad_()))
    temperature = torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda T: rld_loss(s, t, y, 1.0, 8.0, T, T), temperature)


@pytest.mark.parametrize("row", [*rows("RLD"), *rows("RLD+LS")])
def test_pinned_rows(row):
    seed, student = row["seed"], student_logits(row["seed"])
    teacher, target = teacher_logits(seed), labels(seed)
    left_out = teacher >= teacher.gather(1, target[:, None])
    assert left_out.sum() == row["masked_classes"]
    options = [row["opts"][key] for key in ("ALPHA", "BETA", "T", "ALPHA_T")]
    stand = row["method"] == "RLD+LS"
    check(row, lambda: rld_loss(student, teacher, target, *options, logit_stand=stand), student=student)


@pytest.mark.parametrize("epoch, scale", [(1, 0.05), (10, 0.5), (20, 1), (240, 1), (torch.tensor(10), 0.5)])
def test_warm_up(epoch, scale):
    torch.manual_seed(0)
    nets = [cifar_model_dict["resnet8"][0](num_classes=10) for _ in range(2)]
    batch = {"image": torch.randn(2, 3, 32, 32), "target": torch.tensor([3, 4])}
    method = RLD(*nets, CN({"RLD": method_defaults["RLD"].clone()})).train()
    _, losses = method(**batch, epoch=epoch)
    _, full = method(**batch, epoch=20)
    assert losses["loss_kd"].item() == pytest.approx(scale * full["loss_kd"].item(), rel=1e-5)
    assert losses["loss_ce"].item() == pytest.approx(full["loss_ce"].item(), rel=1e-5)


def test_refusals():
    y = torch.tensor([0])
    with pytest.raises(ValueError, match=r"\(1, 3\) and teacher logits \(1, 4\)"):
        rld_loss(torch.zeros(1, 3), torch.zeros(1, 4), y, 1, 1, 4, 1)
    for temperatures in ((-1, 1), (1, -1)):
        with pytest.raises(ValueError, match="positive, it is -1"):
            rld_loss(torch.zeros(1, 3), torch.zeros(1, 3), y, 1, 1, *temperatures)
    with pytest.raises(ValueError, match="RLD needs two classes or more, the logits have 1"):
        rld_loss(torch.zeros(1, 1), torch.zeros(1, 1), y, 1, 1, 4, 1)
