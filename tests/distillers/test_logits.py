"""Which logits and temperatures are refused, and the KL divergence where probabilities are 0."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from mdistiller.distillers._logits import (
    check_logits,
    kl_divergence,
    logit_stand,
    softened,
    standardized,
    tempered_mean,
)
from mdistiller.distillers.DKD import dkd_loss
from mdistiller.distillers.KD import kd_loss
from mdistiller.engine.cfg import CFG

from .checks import check_agrees, check_precision, masked, normal
from .oracles.dkd import naive_kl
from .tensor_rows import check, labels, rows, student_logits, teacher_logits


def test_check_logits():
    check_logits(torch.zeros(2, 3), torch.zeros(2, 3), 0.1)
    with pytest.raises(ValueError, match=r"student logits \(2, 3\) and teacher logits \(2, 4\)"):
        check_logits(torch.zeros(2, 3), torch.zeros(2, 4), 4)
    with pytest.raises(ValueError, match="it is -1"):
        check_logits(torch.zeros(2, 3), torch.zeros(2, 3), -1)
    for shape in ((), (1,), (2, 1)):
        check_logits(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(shape))
    with pytest.raises(ValueError, match=r"a tensor \(2,\); it must be one number, or one for each image, \(2, 1\)"):
        check_logits(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2))


def logarithms(*rows, dtype=torch.float64):
    return torch.tensor(rows, dtype=dtype).log().requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("student", [(1 / 4, 1 / 4, 1 / 2), (1 / 4, 3 / 4, 0)])
def test_a_class_without_probability_contributes_nothing(student, dtype):
    log_s, log_t = logarithms(student, dtype=dtype), logarithms((1 / 2, 1 / 2, 0), dtype=dtype)
    value = kl_divergence(log_s, log_t).mean()
    value.backward()
    ratios = [math.log(1 / 2 / p) for p in student[:2]]
    assert value.item() == pytest.approx(sum(ratios) / 2, rel=1e-6)
    assert log_s.grad.tolist() == [[-0.5, -0.5, 0]]
    assert log_t.grad[0].tolist() == [*(pytest.approx((1 + ratio) / 2) for ratio in ratios), 0]


def test_a_class_that_only_the_student_excludes_makes_it_infinite():
    log_t = logarithms((1 / 2, 1 / 2, 0), (1 / 2, 1 / 4, 1 / 4))
    assert (kl_divergence(logarithms((1, 0, 0), (1 / 2, 1 / 2, 0)), log_t) == math.inf).all()
    assert kl_divergence(log_t[:1], logarithms((0.5, 0.5 - 1e-300, 1e-300))).item() == math.inf


def test_nan_is_not_hidden():
    one, nan = logarithms((1 / 2, 1 / 2)), logarithms((1 / 2, math.nan))
    assert kl_divergence(one, nan).isnan() and kl_divergence(nan, one).isnan()
    assert kl_divergence(nan, logarithms((1, 0))).item() == pytest.approx(math.log(2))  # of a class that is dropped


def test_kl_divergence_agrees_with_the_naive_form():
    log_s, log_t = normal(4, 5).log_softmax(dim=1), normal(4, 5, seed=1).log_softmax(dim=1)

    def naive(log_s, log_t):
        return torch.stack([naive_kl(t, s) for s, t in zip(log_s.exp(), log_t.exp())])

    assert kl_divergence(log_s, log_t).shape == (4,)
    check_agrees(lambda s, t: kl_divergence(s, t).square().sum(), lambda s, t: naive(s, t).square().sum(), log_s, log_t)
    assert gradcheck(kl_divergence, (log_s.requires_grad_(), log_t.requires_grad_()))


def naive_standardized(logits):
    rows = []
    for z in logits:
        kept = [x for x in z if x != -math.inf]
        mean = sum(kept) / len(kept)
        deviation = (sum((x - mean) ** 2 for x in kept) / (len(kept) - 1)) ** 0.5 + 1e-7
        rows.append(torch.stack([(x - mean) / deviation for x in z]))
    return torch.stack(rows)


def test_standardized_agrees_with_the_naive_form():
    logits = masked(4, 6, classes=[(0, 0), (2, 1), (2, 5)])
    torch.testing.assert_close(standardized(logits), naive_standardized(logits), rtol=1e-12, atol=0)
    assert gradcheck(standardized, normal(3, 5).requires_grad_())
    stacked = standardized(torch.stack([logits, 2 * logits], dim=2))
    torch.testing.assert_close(stacked[:, :, 0], standardized(logits), rtol=1e-12, atol=0)


def test_standardized_by_hand():
    # Mean 2, deviation sqrt((4 + 0 + 4) / 2) = 2.
    assert standardized(torch.tensor([[0.0, 2, 4]])).tolist() == [pytest.approx([-1, 0, 1], abs=1e-6)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("row", [[3.0, 3.0, 3.0], [1e4, 0.0, -1e4], [5.0, -math.inf, -math.inf], [7.0, 7.0, -math.inf]])
def test_standardized_is_finite(row, dtype):
    logits = torch.tensor([row], dtype=dtype, requires_grad=True)
    value = standardized(logits)
    value[value.isfinite()].square().sum().backward()
    assert (value == -math.inf).tolist() == [[x == -math.inf for x in row]]
    assert value[value.isfinite()].abs().max() <= 2 and logits.grad.isfinite().all()


@pytest.mark.parametrize("row", rows("KD+LS"))
def test_the_pinned_kd_of_standardised_logits(row):
    seed, student = row["seed"], student_logits(row["seed"])
    check(row, lambda: kd_loss(student, teacher_logits(seed), row["opts"]["T"], logit_stand=True), student=student)


@pytest.mark.parametrize("row", rows("DKD+LS"))
def test_the_pinned_dkd_of_standardised_logits(row):
    seed, student = row["seed"], student_logits(row["seed"])
    settings = (row["opts"][key] for key in ("ALPHA", "BETA", "T"))
    check(
        row,
        lambda: dkd_loss(student, teacher_logits(seed), labels(seed), *settings, logit_stand=True),
        student=student,
    )


LOSSES = [
    lambda s, t, temperature, **more: kd_loss(s, t, temperature, **more),
    lambda s, t, temperature, **more: dkd_loss(s, t, torch.tensor([0, 1, 2, 0]), 1.0, 8.0, temperature, **more),
]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_temperature_for_each_image(loss):
    s, t = normal(4, 5), 3 * normal(4, 5, seed=1)
    temperatures = torch.tensor([[1.0], [2.0], [4.0], [8.0]], dtype=torch.float64)
    alone = [loss(s.roll(-i, 0), t.roll(-i, 0), torch.full((4, 1), float(T))) for i, T in enumerate(temperatures)]
    equal = [loss(s.roll(-i, 0), t.roll(-i, 0), float(T)) for i, T in enumerate(temperatures)]
    torch.testing.assert_close(alone, equal)
    assert gradcheck(lambda s, T: loss(s, t, T), (s.requires_grad_(), temperatures.requires_grad_()))
    one = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    assert loss(s, t, one).item() == pytest.approx(loss(s, t, 4).item())
    assert torch.autograd.grad(loss(s, t, one), one)[0].isfinite()


def test_softened_and_tempered_by_hand():
    logits, temperature = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[1.0], [2.0]])
    assert softened(logits, temperature).tolist() == [[1, 2], [1.5, 2]]
    assert softened(logits[:, :, None], temperature)[..., 0].tolist() == [[1, 2], [1.5, 2]]
    assert tempered_mean(torch.tensor([1.0, 3]), temperature).item() == (1 * 1 + 4 * 3) / 2
    assert tempered_mean(torch.tensor([1.0, 3]), 2).item() == 8


@pytest.mark.parametrize("loss", LOSSES)
def test_standardised_losses_in_low_precision(loss):
    check_precision(lambda s, t: loss(s, t, 2.0, logit_stand=True), normal(4, 5), normal(4, 5, seed=1))


def test_the_switch():
    assert not logit_stand(CFG.KD) and not logit_stand(CFG)
    cfg = CFG.clone()
    cfg.EXPERIMENT.LOGIT_STAND = True
    assert logit_stand(cfg)
