"""The two update rules against explicit training loops."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from mdistiller.engine.dot import DistillationOrientedTrainer
from mdistiller.engine.update import DotUpdate, SumUpdate
from mdistiller.errors import UserError

from ._small import config, network


def losses(model: nn.Module, step: int) -> dict[str, torch.Tensor]:
    """A task loss and two distillation losses on one graph; one of them has the shape (1,)."""
    g = torch.Generator().manual_seed(step)
    logits = model(torch.randn(8, 5, generator=g))
    return {
        "loss_ce": F.cross_entropy(logits, torch.randint(0, 3, (8,), generator=g)),
        "loss_kd": logits.pow(2).mean().reshape(1),
        "loss_feat": 0.1 * logits.abs().mean(),
    }


def test_sum_update_is_bitwise_equal_to_sgd():
    ours, theirs = network(), network()
    update = SumUpdate(ours.parameters(), config())
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for step in range(4):
        total = update(losses(ours, step))
        terms = losses(theirs, step)
        expected = terms["loss_ce"] + terms["loss_kd"].squeeze() + terms["loss_feat"]
        sgd.zero_grad()
        expected.backward()
        sgd.step()
        assert total.shape == () and not total.requires_grad
        torch.testing.assert_close(total, expected.detach(), rtol=1e-6, atol=0)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters()))


def test_dot_against_one_backward_pass_per_kind_of_loss():
    """The loop as the paper writes it, with separate buffers and a forward pass for each kind of loss."""
    ours, theirs = network(), network()
    update = DotUpdate(ours.parameters(), config())
    assert isinstance(update.optimizer, DistillationOrientedTrainer)
    v_task: list = [0.0] * 4
    v_kd: list = [0.0] * 4
    for step in range(4):
        update(losses(ours, step))
        params = list(theirs.parameters())
        kd = losses(theirs, step)
        g_kd = torch.autograd.grad(kd["loss_kd"].sum() + kd["loss_feat"], params)
        g_task = torch.autograd.grad(losses(theirs, step)["loss_ce"], params)
        with torch.no_grad():
            for i, p in enumerate(params):
                v_task[i] = (0.9 - 0.075) * v_task[i] + g_task[i] + 0.01 * p
                v_kd[i] = (0.9 + 0.075) * v_kd[i] + g_kd[i]
                p -= 0.1 * (v_task[i] + v_kd[i])
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("names", [("loss_ce",), ("ce",), ("loss_kd", "loss_feat")])
def test_dot_needs_a_task_loss_and_a_distillation_loss(names):
    model = network()
    before = copy.deepcopy(model.state_dict())
    value = model(torch.ones(1, 5)).sum()
    with pytest.raises(UserError, match=f"only {', '.join(names)}; use SOLVER.TRAINER base"):
        DotUpdate(model.parameters(), config())(dict.fromkeys(names, value))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


