"""PKT against its equations."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from mdistiller.distillers.PKT import pkt_loss

from .checks import check_agrees, check_precision, normal
from .oracles.pkt import naive_pkt_loss


@pytest.mark.parametrize("batch, width_s, width_t", [(1, 3, 3), (2, 1, 5), (7, 4, 3), (5, 9, 9)])
def test_agrees_with_the_naive_form(batch, width_s, width_t):
    check_agrees(pkt_loss, naive_pkt_loss, normal(batch, width_s), normal(batch, width_t, seed=1))
    f_s, f_t = normal(batch, width_s), normal(batch, width_t, seed=1)
    check_agrees(lambda s, t: pkt_loss(s, t, 1e-3), lambda s, t: naive_pkt_loss(s, t, 1e-3), f_s, f_t)


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
