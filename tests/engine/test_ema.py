"""The exponential moving average (EMA) of the weights."""

import pytest
import torch
import torch.nn as nn

from mdistiller.engine.ema import EMA


def test_the_ema_against_values_by_hand():
    """d = min(0.5, (1 + n) / (10 + n)): 2/11, then 3/12, then 4/13."""
    network = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    weight = network[0].weight
    with torch.no_grad():
        weight.fill_(0.0)
        ema = EMA(network, 0.5)
        for value in (11.0, 20.0, 1.0):
            weight.fill_(value)
            network[1].running_mean.fill_(value)
            network[1].num_batches_tracked += 1
            ema.update(network)
    expected = 9.0  # 0 * 2/11 + 11 * 9/11
    expected = expected * 3 / 12 + 20 * 9 / 12
    expected = expected * 4 / 13 + 1 * 9 / 13
    assert ema.network[0].weight.item() == pytest.approx(expected, rel=1e-6)
    assert ema.network[1].running_mean.item() == pytest.approx(expected, rel=1e-6)
    assert ema.network[1].num_batches_tracked == 3


def test_the_decay_reaches_its_final_value_and_the_ema_needs_no_gradient():
    network = nn.Linear(1, 1)
    ema = EMA(network, 0.9)
    ema.updates = 10_000
    with torch.no_grad():
        ema.network.weight.fill_(0.0)
        network.weight.fill_(1.0)
    ema.update(network)
    assert ema.network.weight.item() == pytest.approx(0.1, rel=1e-6)
    assert not any(p.requires_grad for p in ema.network.parameters())
