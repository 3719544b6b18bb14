"""CRLD against loops over images and classes; the pinned loss; masks and views."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from mdistiller.distillers.CRLD import crld_loss
from mdistiller.errors import UserError

from . import tensor_rows
from .checks import check_agrees, check_precision, normal
from .extremes import OF_BOTH_VIEWS, students_of

WEIGHTS = 2.0, 0.5


def naive(s_weak, t_weak, s_strong, t_strong, temperature, within, cross, tau_weak, tau_strong, standardize=False):
    """With gradients: image by image, of the terms whose mask is 1 alone."""

    def divergence(teacher, student):
        if standardize:
            teacher, student = ((z - z.mean()) / (1e-7 + z.std()) for z in (teacher, student))
        p, log_q = (teacher / temperature).softmax(0), (student / temperature).log_softmax(0)
        return temperature**2 * sum(a * (a.log() - b) for a, b in zip(p, log_q) if a > 0)

    total = 0 * s_weak.nan_to_num().sum()
    for sw, tw, ss, ts in zip(s_weak, t_weak, s_strong, t_strong):
        if np.max(tw.softmax(0).tolist()) >= tau_weak:
            total = total + within * (divergence(tw, sw) + divergence(ts, ss))
        if np.max(ts.softmax(0).tolist()) >= tau_strong:
            total = total + cross * (divergence(tw, ss) + divergence(ts, sw))
    return total / len(s_weak)


def views(batch, classes, seed=0):
    return [(1 + i) * normal(batch, classes, seed=seed + i) for i in range(4)]


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize(
    "batch, classes, temperature, tau_weak, tau_strong",
    [(1, 2, 4.0, 0, 0), (6, 5, 1.0, 0.6, 0.9), (4, 10, 0.7, 0.5, 1), (4, 10, 2, 0.3, 0.7)],
)
def test_agrees_with_the_naive_form(batch, classes, temperature, tau_weak, tau_strong, standardize):
    rest = temperature, *WEIGHTS, tau_weak, tau_strong, standardize
    inputs = views(batch, classes)
    check_agrees(lambda *z: crld_loss(*z, *rest), lambda *z: naive(*z, *rest), *inputs)
    strong_first = inputs[2:] + inputs[:2]
    check_agrees(
        lambda ss, ts, sw, tw: crld_loss(sw, tw, ss, ts, *rest), lambda ss, ts, sw, tw: naive(sw, tw, ss, ts, *rest),
        *strong_first,
    )  # fmt: skip


def test_by_hand():
    # The student gives 1/2 to both classes. The teacher: (1, 0) on the weak view, (3/4, 1/4) on the strong one.
    even, weak = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[1e4, -1e4]], dtype=torch.float64)
    strong = torch.tensor([[3.0, 1.0]], dtype=torch.float64).log()
    of_weak, of_strong = math.log(2), 3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2)
    within = cross = of_weak + of_strong

    def loss(*tau):
        return crld_loss(even, weak, even, strong, 1, *WEIGHTS, *tau).item()

    assert loss(0.9, 0.7) == pytest.approx(2 * within + 0.5 * cross)
    assert loss(0.9, 0.8) == pytest.approx(2 * within)
    # The teacher is sure of the strong view only: the weak view's mask leaves out the strong view's own term too.
    assert crld_loss(even, strong, even, weak, 1, *WEIGHTS, 0.9, 0.2).item() == pytest.approx(0.5 * cross)
    # The mean is over both images, though one is left out.
    both = [torch.cat(pair) for pair in ((even, even), (weak, even), (even, even), (strong, even))]
    assert crld_loss(*both, 1, *WEIGHTS, 0.9, 0.7).item() == pytest.approx((2 * within + 0.5 * cross) / 2)


@pytest.mark.parametrize("row", tensor_rows.rows("CRLD"))
def test_pinned_losses(row):
    s_weak, t_weak, s_strong, t_strong = tensor_rows.two_views(row["seed"])
    opts, target = row["opts"], tensor_rows.labels(row["seed"])
    ce = F.cross_entropy(s_weak, target) + F.cross_entropy(s_strong, target)
    names = "T", "WV_WEIGHT", "CV_WEIGHT", "TAU_W", "TAU_S"
    kd = crld_loss(s_weak, t_weak, s_strong, t_strong, *(opts[name] for name in names))
    losses = row["losses"]
    assert (ce.item(), kd.item()) == (
        pytest.approx(losses["loss_ce"], rel=1e-6), pytest.approx(losses["loss_kd"], rel=1e-6)
    )  # fmt: skip
    tensor_rows.check(row, lambda: ce + kd, student_weak=s_weak, student_strong=s_strong)


def test_gradients_and_precision():
    s_weak, t_weak, s_strong, t_strong = views(3, 4)

    def loss(s_weak, s_strong, t_weak=t_weak, t_strong=t_strong):
        return crld_loss(s_weak, t_weak, s_strong, t_strong, 4, *WEIGHTS, 0.5, 0.2)

    check_precision(loss, s_weak, s_strong, t_weak, t_strong)
    assert gradcheck(loss, (s_weak.requires_grad_(), s_strong.requires_grad_()))


@pytest.mark.parametrize("standardize", [False, True])
@OF_BOTH_VIEWS
def test_finite_where_the_usual_form_fails(teacher, standardize):
    for leaf in students_of(teacher):
        loss = crld_loss(leaf, teacher, leaf, teacher, 4, *WEIGHTS, 0.5, 0.2, standardize)
        loss.backward()
        assert loss.isfinite() and leaf.grad.isfinite().all()


def test_refusals():
    with pytest.raises(ValueError, match="temperature must be positive"):
        crld_loss(*views(2, 3), 0, *WEIGHTS, 0.5, 0.5)
    with pytest.raises(UserError, match="differ in shape"):
        crld_loss(*views(2, 3)[:3], torch.zeros(2, 4), 4, *WEIGHTS, 0.5, 0.5)
