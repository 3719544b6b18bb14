"""Which logits and temperatures are refused, and the KL divergence where probabilities are 0."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from mdistiller.distillers._logits import check_logits, kl_divergence

from .checks import check_agrees, normal
from .oracles.dkd import naive_kl


def test_check_logits():
    check_logits(torch.zeros(2, 3), torch.zeros(2, 3), 0.1)
    with pytest.raises(ValueError, match=r"student logits \(2, 3\) and teacher logits \(2, 4\)"):
        check_logits(torch.zeros(2, 3), torch.zeros(2, 4), 4)
    with pytest.raises(ValueError, match="it is -1"):
        check_logits(torch.zeros(2, 3), torch.zeros(2, 3), -1)


def logarithms(*rows, dtype=torch.float64):
    return torch.tensor(rows, dtype=dtype).log().requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("student", [(1 / 4, 1 / 4, 1 / 2), (1 / 4, 3 / 4, 0)])
def test_a_class_without_probability_contributes_nothing(student, dtype):
    log_s, log_t = logarithms(student, dtype=dtype), logarithms((1 / 2, 1 / 2, 0), dtype=dtype)
    value = kl_divergence(log_s, log_t)
    value.backward()
    ratios = [math.log(1 / 2 / p) for p in student[:2]]
    assert value.item() == pytest.approx(sum(ratios) / 2, rel=1e-6)
    assert log_s.grad.tolist() == [[-0.5, -0.5, 0]]
    assert log_t.grad[0].tolist() == [*(pytest.approx((1 + ratio) / 2) for ratio in ratios), 0]


def test_a_class_that_only_the_student_excludes_makes_it_infinite():
    log_t = logarithms((1 / 2, 1 / 2, 0), (1 / 2, 1 / 4, 1 / 4))
    assert kl_divergence(logarithms((1, 0, 0), (1 / 2, 1 / 2, 0)), log_t).item() == math.inf
    assert kl_divergence(log_t[:1], logarithms((0.5, 0.5 - 1e-300, 1e-300))).item() == math.inf


def test_nan_is_not_hidden():
    one, nan = logarithms((1 / 2, 1 / 2)), logarithms((1 / 2, math.nan))
    assert kl_divergence(one, nan).isnan() and kl_divergence(nan, one).isnan()
    assert kl_divergence(nan, logarithms((1, 0))).item() == pytest.approx(math.log(2))  # of a class that is dropped


def test_kl_divergence_agrees_with_the_naive_form():
    log_s, log_t = normal(4, 5).log_softmax(dim=1), normal(4, 5, seed=1).log_softmax(dim=1)

    def naive(log_s, log_t):
        return torch.stack([naive_kl(t, s) for s, t in zip(log_s.exp(), log_t.exp())]).mean()

    check_agrees(kl_divergence, naive, log_s, log_t)
    assert gradcheck(kl_divergence, (log_s.requires_grad_(), log_t.requires_grad_()))
