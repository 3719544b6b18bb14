"""Aligned gradients: by hand, against plain training where they agree, and with what works on one gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from mdistiller.engine.split_update import AlignedUpdate, disagreement
from mdistiller.engine.update import SumUpdate
from mdistiller.errors import UserError

from ._small import config, network
from .test_dot import parameter
from .test_update import Heated


def linear(params: dict[str, nn.Parameter], **grads: dict[str, float]) -> dict[str, Tensor]:
    """Losses whose gradients are `grads`: loss -> parameter -> number."""
    return {
        loss: torch.stack([number * params[name].sum() for name, number in own.items()]).sum()
        for loss, own in grads.items()
    }


@pytest.mark.parametrize(
    "task, kd, expected",
    [
        # <g_kd, g_task> -3, |g_task|^2 1 + 4, c -0.6: (1 - 3 + 0.6, 4, 2 + 1.2); what only one reaches counts as zero.
        ({"a": 1, "c": 2}, {"a": -3, "b": 4}, {"a": -1.4, "b": 4, "c": 3.2}),
        # They agree, 3 > 0: the sum.
        ({"a": 1, "c": 2}, {"a": 3, "b": 4}, {"a": 4, "b": 4, "c": 2}),
        # Over all parameters together they agree, -3 + 4 > 0, although not on a.
        ({"a": 1, "c": 2}, {"a": -3, "c": 2}, {"a": -2, "c": 4}),
        # Opposite: nothing of g_kd is left.
        ({"a": 1, "c": 2}, {"a": -2, "c": -4}, {"a": 1, "c": 2}),
        # Perpendicular, and none in common.
        ({"a": 1, "c": 1}, {"a": -1, "c": 1}, {"a": 0, "c": 2}),
        ({"a": 1}, {"b": -1}, {"a": 1, "b": -1}),
        # No task gradient: nothing to align with.
        ({"a": 0, "c": 0}, {"a": -1, "b": 2}, {"a": -1, "b": 2, "c": 0}),
    ],
)
def test_by_hand(task, kd, expected):
    params = {name: parameter([0.0]) for name in "abc"}
    update = AlignedUpdate(params.values(), config(LR=1.0, MOMENTUM=0.0, WEIGHT_DECAY=0.0))
    update.backward(linear(params, loss_ce=task, loss_kd=kd))
    without = {id(p) for p in update.without_gradient()}
    assert {name for name, p in params.items() if id(p) in without} == params.keys() - expected.keys()
    norm = update.norm()
    found = {name: p.grad.item() for name, p in params.items() if p.grad is not None}
    assert found == pytest.approx(expected)
    assert norm.item() == pytest.approx(sum(x * x for x in expected.values()) ** 0.5)
    update.step(norm)
    assert {n: -p.item() for n, p in params.items()} == pytest.approx({"a": 0, "b": 0, "c": 0} | expected)
    assert all(p.grad is None and not update.kept.has(p) for p in params.values())


def opposed(model: nn.Module, step: int, images: slice = slice(None)) -> dict[str, Tensor]:
    """A distillation loss that mostly works against the task loss: a mean over images, of the shape (1,)."""
    g, own = torch.Generator().manual_seed(step), next(model.parameters())
    image, target = torch.randn(8, 5, generator=g), torch.randint(0, 3, (8,), generator=g)
    logits = model(image[images].to(own))
    ce = nn.functional.cross_entropy(logits, target[images])
    return {"loss_ce": ce, "loss_kd": (logits.square().mean() - 0.8 * ce).reshape(1)}


def test_the_step_is_that_of_the_formula_over_all_parameters():
    """Four steps of SGD with momentum and decay, the formula on flat vectors."""
    ours, theirs = network().double(), network().double()
    update = AlignedUpdate(ours.parameters(), config())
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    signs = []
    for step in range(4):
        total = update(opposed(ours, step))
        terms, params = opposed(theirs, step), list(theirs.parameters())
        assert total.item() == pytest.approx(sum(loss.item() for loss in terms.values()))
        flat = [
            torch.cat([g.flatten() for g in torch.autograd.grad(terms[name].sum(), params, retain_graph=True)])
            for name in ("loss_ce", "loss_kd")
        ]
        inner = flat[0] @ flat[1]
        signs.append(bool(inner < 0))
        aligned = flat[1] - min(0.0, (inner / flat[0].square().sum()).item()) * flat[0]
        assert aligned @ flat[0] >= -1e-12
        for p, piece in zip(params, (flat[0] + aligned).split([p.numel() for p in params])):
            p.grad = piece.view_as(p)
        sgd.step()
        for p, q in zip(ours.parameters(), params):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    assert True in signs


def test_gradients_that_agree_take_plain_steps():
    ours, theirs = Heated(), Heated()
    aligned, plain = AlignedUpdate(ours.learnable(), config()), SumUpdate(theirs.learnable(), config())
    for step in range(3):
        task = [model.losses(step)["loss_ce"] for model in (ours, theirs)]
        totals = [rule({"loss_ce": own, "loss_kd": 2 * own}) for rule, own in zip((aligned, plain), task)]
        torch.testing.assert_close(*totals)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_micro_batches_add_up_before_they_are_aligned():
    whole, parts = network().double(), network().double()
    updates = [AlignedUpdate(model.parameters(), config(CLIP_GRAD_NORM=0.3)) for model in (whole, parts)]
    for step in range(3):
        updates[0](opposed(whole, step))
        for images, weight in ((slice(0, 5), 5 / 8), (slice(5, 8), 3 / 8)):
            updates[1].backward(opposed(parts, step, images), weight)
        norm = updates[1].norm()
        updates[1].step(norm)
    for p, q in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", [{}, {"TYPE": "AdamW", "LR": 0.001}], ids=["SGD", "AdamW"])
def test_the_loss_scale_of_fp16_and_clipping(solver):
    """The scale is a power of two: it cancels exactly on a CPU."""
    scaled, exact = network(), network()
    for model, amp in ((scaled, "fp16"), (exact, "none")):
        update = AlignedUpdate(model.parameters(), config(AMP=amp, CLIP_GRAD_NORM=0.5, **solver))
        for step in range(3):
            update(opposed(model, step))
    assert all(torch.equal(p, q) for p, q in zip(scaled.parameters(), exact.parameters()))


def test_a_skipped_step_leaves_nothing():
    one, other = network(), network()
    updates = [AlignedUpdate(model.parameters(), config()) for model in (one, other)]
    for after_norm in (False, True):
        bad = opposed(one, 7)
        updates[0].backward({name: loss * torch.nan for name, loss in bad.items()})
        if after_norm:
            assert updates[0].norm().isnan()
        updates[0].skip()
        for update, model in zip(updates, (one, other)):
            update(opposed(model, 1))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters()))


def test_gradients_too_small_for_their_square():
    """In float32 the square of 1e-25 is 0; without a norm there is nothing to divide by."""
    tiny = [torch.full((3,), 1e-25)]
    assert disagreement([-tiny[0]], tiny, tiny).item() == 0
    assert disagreement([torch.full((3,), -1e25)], tiny, tiny).item() == 0
    assert disagreement([], [], tiny).item() == 0 and disagreement([], [], []).item() == 0


@pytest.mark.parametrize("names", [("loss_ce",), ("loss_kd", "loss_feat")])
def test_both_kinds_of_loss_are_needed(names):
    model = network()
    value = model(torch.ones(1, 5)).sum()
    with pytest.raises(UserError, match=f"gradient alignment needs .* only {', '.join(names)}; use SOLVER.TRAINER"):
        AlignedUpdate(model.parameters(), config())(dict.fromkeys(names, value))
