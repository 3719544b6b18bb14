"""MLKD against loops over images, classes and temperatures; the pinned losses; its two views in the method."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from yacs.config import CfgNode as CN

from mdistiller.distillers import MLKD, method_defaults
from mdistiller.distillers.MLKD import mlkd_loss
from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.modes import check_modes
from mdistiller.engine.update import SumUpdate
from mdistiller.errors import UserError
from mdistiller.models import cifar_model_dict

from . import tensor_rows
from .checks import check_precision, normal
from .extremes import OF_BOTH_VIEWS, students_of


def probabilities(logits, temperature, standardize=False):
    z = np.asarray(logits, dtype=np.float64)
    if standardize:
        z = (z - z.mean()) / (1e-7 + z.std(ddof=1))
    z = np.exp((z - z.max()) / temperature)
    return z / z.sum()


def divergences(student, teacher, temperature, standardize):
    """T^2 KL of every image."""
    values = []
    for s, t in zip(student.tolist(), teacher.tolist()):
        p_s, p_t = (probabilities(z, temperature, standardize) for z in (s, t))
        values.append(temperature**2 * sum(a * (math.log(a) - math.log(b)) for a, b in zip(p_t, p_s) if a > 0))
    return values


def squares(matrix_t, matrix_s):
    """The squared differences of each row, summed."""
    return [sum((a - b) ** 2 for a, b in zip(*rows)) for rows in zip(matrix_t, matrix_s)]


def naive(s_weak, t_weak, s_strong, t_strong, temperature, standardize=False, as_released=True):
    p = np.array([probabilities(z, 1) for z in t_weak.tolist()])
    (images, classes) = len(p), p.shape[1]
    sure, mass = p.max(1), p.sum(0)
    keep_images, keep_classes = sure <= np.percentile(sure, 50), mass <= np.percentile(mass, 50)
    kd = cc = bc = 0.0
    for place, one in enumerate((temperature, 3, 5, 2, 6)):
        weak = divergences(s_weak, t_weak, one, standardize)
        strong = divergences(s_strong, t_strong, one, standardize)
        if as_released:
            kd += keep_images.mean() * np.mean(weak) + np.mean(weak if place > 2 else strong)
        else:
            kd += sum(v for v, keep in zip(weak, keep_images) if keep) / images + np.mean(strong)
        p_s, p_t = (np.array([probabilities(z, one) for z in view.tolist()]) for view in (s_weak, t_weak))
        of_classes, of_images = squares(p_t.T @ p_t, p_s.T @ p_s), squares(p_t @ p_t.T, p_s @ p_s.T)
        if as_released:
            cc += keep_classes.mean() * sum(of_classes) / classes
            bc += keep_images.mean() * sum(of_images) / images
        else:
            cc += sum(v for v, keep in zip(of_classes, keep_classes) if keep) / classes
            bc += sum(v for v, keep in zip(of_images, keep_images) if keep) / images
    return kd, cc, bc


def views(batch, classes, seed=0):
    return [(1 + i) * normal(batch, classes, seed=seed + i) for i in range(4)]


@pytest.mark.parametrize("as_released", [True, False])
@pytest.mark.parametrize(
    "batch, classes, temperature, standardize",
    [(1, 2, 4, False), (2, 7, 1.0, True), (5, 3, 0.7, False), (6, 10, 2, True)],
)
def test_agrees_with_the_naive_form(batch, classes, temperature, standardize, as_released):
    inputs = views(batch, classes)
    ours = mlkd_loss(*inputs, temperature, standardize, as_released)
    expected = naive(*inputs, temperature, standardize, as_released)
    assert [value.item() for value in ours] == pytest.approx(expected, rel=1e-9, abs=1e-14)


def test_by_hand():
    # At every temperature, the student gives 1/2 to both classes. The teacher, on the weak view: (1, 0) and (1/2, 1/2).
    even, teacher = torch.zeros(2, 2, dtype=torch.float64), torch.tensor([[1e4, -1e4], [0, 0]], dtype=torch.float64)
    # T^2 of 1, 3, 5, 2, 6 is 75 in sum, of 2 and 6 it is 40. Half of the images, and of the classes, is up to the
    # median.
    kd, cc, bc = mlkd_loss(even, teacher, even, even, 1)
    assert kd.item() == pytest.approx((75 / 2 + 40) * math.log(2) / 2)
    assert cc.item() == pytest.approx(5 * 0.5 * (0.75**2 + 3 * 0.25**2) / 2)  # (5/4, 1/4; 1/4, 1/4) against 1/2
    assert bc.item() == pytest.approx(5 * 0.5 * 0.5**2 / 2)  # (1, 1/2; 1/2, 1/2) against 1/2
    # One by one: the second image, of which both are equally unsure, and the second class.
    kd, cc, bc = mlkd_loss(even, teacher, even, even, 1, as_released=False)
    assert (kd.item(), bc.item()) == (0, 0) and cc.item() == pytest.approx(5 * 2 * 0.25**2 / 2)
    # The strong view alone, (1, 0) against (1/2, 1/2) once more: three of the five terms, or all.
    strong = (even, even, even, teacher, 1)
    assert mlkd_loss(*strong)[0].item() == pytest.approx(35 * math.log(2) / 2)
    assert mlkd_loss(*strong, as_released=False)[0].item() == pytest.approx(75 * math.log(2) / 2)


@pytest.mark.parametrize("row", tensor_rows.rows("MLKD"))
def test_pinned_losses(row):
    s_weak, t_weak, s_strong, t_strong = tensor_rows.two_views(row["seed"])
    opts, target = row["opts"], tensor_rows.labels(row["seed"])
    ce = F.cross_entropy(s_weak, target) + F.cross_entropy(s_strong, target)
    parts = mlkd_loss(s_weak, t_weak, s_strong, t_strong, opts["T"], opts.get("LOGIT_STAND", False))
    weighted = [opts["CE_WEIGHT"] * ce, *(opts["KD_WEIGHT"] * part for part in parts)]
    names = ["loss_ce", "loss_kd", "loss_cc", "loss_bc"]
    assert [value.item() for value in weighted] == [pytest.approx(row["losses"][name], rel=1e-6) for name in names]
    tensor_rows.check(row, lambda: sum(weighted), student_weak=s_weak, student_strong=s_strong)


def test_the_pinned_figure_of_masks_for_each_image_and_all_strong_terms():
    kd, _, _ = mlkd_loss(*tensor_rows.two_views(1000), 4.0, as_released=False)
    assert 0.9 * kd.item() == pytest.approx(46.3209812541, rel=1e-6)


@pytest.mark.parametrize("as_released", [True, False])
def test_gradients_and_precision(as_released):
    s_weak, t_weak, s_strong, t_strong = views(3, 4)

    def total(s_weak, s_strong, t_weak=t_weak, t_strong=t_strong):
        return sum(mlkd_loss(s_weak, t_weak, s_strong, t_strong, 4, as_released=as_released))

    check_precision(total, s_weak, s_strong, t_weak, t_strong)
    assert gradcheck(total, (s_weak.requires_grad_(), s_strong.requires_grad_()))


@pytest.mark.parametrize("standardize", [False, True])
@OF_BOTH_VIEWS
def test_finite_where_the_usual_form_fails(teacher, standardize):
    for leaf in students_of(teacher):
        values = mlkd_loss(leaf, teacher, leaf, teacher, 4, standardize)
        sum(values).backward()
        assert all(value.isfinite() for value in values) and leaf.grad.isfinite().all()


def test_refusals():
    with pytest.raises(ValueError, match="temperature must be positive"):
        mlkd_loss(*views(2, 3), 0)
    with pytest.raises(UserError, match="differ in shape"):
        mlkd_loss(*views(2, 3)[:3], torch.zeros(2, 4), 4)
    words = ["DISTILLER.TYPE", "MLKD", "SOLVER.ACCUMULATE", "2", "EXPERIMENT.DEVICE", "cpu"]
    with pytest.raises(UserError, match="MLKD, which compares the images of a batch"):
        check_modes(load_cfg("configs/digits/kd.yaml", words), MLKD, SumUpdate, 1)


def test_the_student_sees_the_views_one_after_the_other():
    """Two forward passes, each with BatchNorm's statistics of its own view; `image` is not looked at."""
    torch.manual_seed(0)
    networks = [cifar_model_dict["resnet8"][0](num_classes=5) for _ in range(2)]
    method = MLKD(*networks, CN({"MLKD": method_defaults["MLKD"]})).train()
    weak, strong = torch.rand(2, 4, 3, 32, 32)
    target = torch.arange(4)
    logits, losses = method(image=strong, image_weak=weak, image_strong=strong, target=target, index=target, epoch=1)
    assert int(networks[0].bn1.num_batches_tracked) == 2
    with torch.no_grad():
        expected = networks[0](weak)[0], networks[0](strong)[0]
    torch.testing.assert_close(logits, expected[0])
    ce = 0.1 * sum(F.cross_entropy(own, target) for own in expected)
    torch.testing.assert_close(losses["loss_ce"], ce)
