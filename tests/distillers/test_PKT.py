"""PKT against its equations."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from mdistiller.distillers.PKT import pkt_loss

from .checks import check_precision, normal
from .oracles.pkt import exact_pkt


@pytest.mark.parametrize("batch, width_s, width_t", [(1, 3, 3), (2, 1, 5), (7, 4, 3), (5, 9, 9)])
def test_agrees_with_the_naive_form(batch, width_s, width_t):
    """In 50 digits: of width 1, two vectors are equal or opposite, and the naive form in float64 loses nine digits."""
    f_s, f_t = normal(batch, width_s).requires_grad_(), normal(batch, width_t, seed=1)
    for eps in (1e-7, 1e-3):
        loss = pkt_loss(f_s, f_t, eps)
        ours = loss.detach(), torch.autograd.grad(loss, f_s)[0]
        torch.testing.assert_close(ours, exact_pkt(f_s.detach(), f_t, eps), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("distance, rtol", [(1e-1, 1e-4), (1e-2, 1e-4), (1e-3, 1e-3), (1e-4, 1e-2)])
def test_float32_keeps_its_digits_near_the_teacher(distance, rtol):
    """Where the textbook's form is 0.01 %, 9 % and 13 % off, and then 370 times the value."""
    f_t = normal(64, 64).abs().float()
    f_s = f_t + distance * normal(64, 64, seed=2).float()
    exact = pkt_loss(f_s.double(), f_t.double())
    torch.testing.assert_close(pkt_loss(f_s, f_t).double(), exact, rtol=rtol, atol=0)


def test_by_hand():
    # Equal vectors: k = 1 everywhere, p_s = 1/2. Orthogonal ones: k = 1 and 1/2, p_t = 2/3 and 1/3.
    f_s, f_t = torch.ones(2, 3, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    expected = (2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)) / 2
    assert pkt_loss(f_s, f_t).item() == pytest.approx(expected, rel=1e-6)
    assert pkt_loss(f_t, 5 * f_t).item() == pytest.approx(0, abs=1e-9)


def test_gradients_and_precision():
    f_s, f_t = normal(4, 3), normal(4, 5, seed=1)
    assert gradcheck(pkt_loss, (f_s.clone().requires_grad_(), f_t.clone().requires_grad_()))
    check_precision(pkt_loss, f_s, f_t)


def test_zero_and_opposite_vectors():
    f_s = torch.tensor([[0.0, 0.0], [1.0, 2.0], [-1.0, -2.0]], requires_grad=True)
    loss = pkt_loss(f_s, normal(3, 2).float())
    loss.backward()
    assert loss.isfinite() and f_s.grad.isfinite().all()
