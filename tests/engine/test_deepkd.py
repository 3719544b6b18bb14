"""DeepKD's optimizer against recorded updates and steps by hand, and its trainer against recorded steps of networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mdistiller.engine.cfg import CFG
from mdistiller.engine.deepkd import OTHERS, TARGET, DeepKDOptimizer
from mdistiller.engine.split_gradients import TASK
from mdistiller.engine.split_update import DeepKDUpdate
from mdistiller.errors import UserError

from .. import _golden
from ..distillers.test_new_golden import batch, build, close
from ._small import config, network
from .test_dot import check_resumed, give, noise, parameter

WHICH = pytest.mark.parametrize("released", [False, True], ids=["intended", "released"])


def optimizer_of(case: dict[str, Any], groups: Any, released: bool) -> DeepKDOptimizer:
    deltas = {"momentum": "delta_tog", "momentum_target": "delta_tcg", "momentum_others": "delta_ncg"}
    momenta = {name: case["momentum"] + case[delta] for name, delta in deltas.items()}
    return DeepKDOptimizer(groups, lr=case["lr"], weight_decay=case["weight_decay"], released=released, **momenta)


@pytest.mark.parametrize("case", _golden.load("deepkd_optimizer"), ids=lambda case: f"delta {case['delta_ncg']}")
@pytest.mark.parametrize("one_group", [True, False])
@WHICH
def test_recorded_steps(case, one_group, released):
    params = {name: parameter(values) for name, values in case["init"].items()}
    groups = list(params.values()) if one_group else [{"params": [p]} for p in params.values()]
    optimizer = optimizer_of(case, groups, released)
    for step in case["steps"]:
        for kind, key in ((OTHERS, "ncg_grad"), (TARGET, "tcg_grad")):
            give(params, step[key])
            optimizer.kept.take(kind, list(params.values()))
        give(params, step["tog_grad"])
        optimizer.step()
        for name, p in params.items():
            after = torch.tensor(step["after_released" if released else "after_intended"][name], dtype=torch.float64)
            torch.testing.assert_close(p.data, after, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", _golden.load("deepkd_optimizer"), ids=lambda case: f"delta {case['delta_ncg']}")
@WHICH
def test_recorded_steps_through_the_update_rule(case, released):
    """With losses whose gradients are the recorded ones, and the settings of the configuration."""
    params = {name: parameter(values) for name, values in case["init"].items()}
    own = {name.upper(): case[name] for name in ("delta_tog", "delta_tcg", "delta_ncg")}
    cfg = config(LR=case["lr"], MOMENTUM=case["momentum"], WEIGHT_DECAY=case["weight_decay"])
    cfg.SOLVER.DEEPKD.update({**own, "RELEASED": released})
    update = DeepKDUpdate(params.values(), cfg)
    names = {"loss_task": "tog_grad", "loss_tckd": "tcg_grad", "loss_nckd": "ncg_grad"}
    for step in case["steps"]:
        update({
            loss: torch.stack([
                (torch.tensor(grad, dtype=torch.float64) * params[name]).sum() for name, grad in step[key].items()
            ]).sum()
            for loss, key in names.items()
        })  # fmt: skip
        for name, p in params.items():
            after = torch.tensor(step["after_released" if released else "after_intended"][name], dtype=torch.float64)
            torch.testing.assert_close(p.data, after, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("row", _golden.load("deepkd_networks"), ids=lambda row: f"{row['case']['on']}")
@WHICH
def test_recorded_steps_of_networks(row, released):
    """Losses and gradients of the first step, and the sum of the losses in four, through the update rule."""
    case = dict(row["case"])
    solver = {name.upper(): row[name] for name in ("delta_tog", "delta_tcg", "delta_ncg")}
    opts = {f"SOLVER.DEEPKD.{name}": value for name, value in solver.items()}
    opts |= {"SOLVER.LR": row["lr"], "SOLVER.MOMENTUM": row["momentum"], "SOLVER.WEIGHT_DECAY": row["weight_decay"]}
    row = {**row, "case": {**case, "method": case["on"]}, "extra_state": []}
    distiller = build(row)
    cfg = CFG.clone()
    cfg.merge_from_list([x for option in {**opts, **case["opts"]}.items() for x in option])
    cfg.SOLVER.DEEPKD.RELEASED = released
    DeepKDUpdate.prepare(distiller, cfg)
    update = DeepKDUpdate(distiller.get_learnable_parameters(), cfg)
    params = list(distiller.student.parameters())
    for step, expected in enumerate(row["trajectory_released" if released else "trajectory_intended"]):
        _, losses = distiller(**batch(row, step))
        if step == 0:
            assert {name: loss.item() for name, loss in losses.items()} == {
                name: close(value) for name, value in row["losses"].items()
            }
            for name, norm in row["student_grad_norm"].items():
                grads = torch.autograd.grad(losses[name], params, retain_graph=True)
                assert torch.cat([g.flatten() for g in grads]).norm().item() == close(norm), name
        assert update(losses).item() == close(expected), f"step {step}"


@pytest.mark.parametrize("released, second", [(False, -1.6875), (True, -1.625)])
def test_two_steps_by_hand(released, second):
    """p 1, lr 1/2, momenta 1/2 (task), 1/4 (target) and 3/4 (others), decay 1; every gradient is 1."""
    p = parameter([1.0])
    optimizer = DeepKDOptimizer(
        [p], lr=0.5, momentum=0.5, momentum_target=0.25, momentum_others=0.75, weight_decay=1.0, released=released
    )
    # First: 1 - 1/2 - 1/2 = 0, v_target 1 + 0, then 0 - 1/2. Second, intended: v_task 3/2, -0.5 - 0.75 = -1.25;
    # v_others 7/4, -2.125; v_target 1/4 + 1 - 2.125 = -0.875, -1.6875. Released: v_task 5/4, -1.125; -2; -0.75; -1.625.
    for after in (-0.5, second):
        for kind in (OTHERS, TARGET):
            p.grad = torch.ones(1, dtype=torch.float64)
            optimizer.kept.take(kind, [p])
        p.grad = torch.ones(1, dtype=torch.float64)
        optimizer.step()
        assert p.item() == pytest.approx(after, abs=1e-15)


def two_groups() -> tuple[list[torch.nn.Parameter], DeepKDOptimizer]:
    params = [torch.nn.Parameter(noise(99, i)) for i in range(3)]
    groups = [{"params": params[:1], "lr": 0.5, "weight_decay": 0.0}, {"params": params[1:], "momentum_others": 0.7}]
    momenta = {"momentum": 0.8, "momentum_target": 0.6, "momentum_others": 0.95}
    return params, DeepKDOptimizer(groups, lr=0.1, weight_decay=0.01, **momenta)


def step(params: list[torch.nn.Parameter], optimizer: DeepKDOptimizer, number: int) -> None:
    """All three gradients reach the first two parameters, the task's and the others' the third."""
    for place, kind in enumerate((OTHERS, TARGET, TASK)):
        for i, p in enumerate(params):
            p.grad = None if (i, kind) == (2, TARGET) else noise(number, 3 * place + i)
        if kind != TASK:
            optimizer.kept.take(kind, params)
    optimizer.step()


def test_groups_keep_their_own_values():
    params, optimizer = two_groups()
    expected = [p.detach().clone() for p in params]
    buffers = [dict.fromkeys((TASK, OTHERS, TARGET), 0.0) for _ in params]
    for number in range(3):
        step(params, optimizer, number)
        for i, v in enumerate(buffers):
            lr, decay, others = (0.5, 0.0, 0.95) if i == 0 else (0.1, 0.01, 0.7)
            v[TASK] = 0.8 * v[TASK] + noise(number, 6 + i)
            expected[i] -= lr * v[TASK]
            v[OTHERS] = others * v[OTHERS] + noise(number, i)
            expected[i] -= lr * v[OTHERS]
            if i < 2:  # the third is not decayed: the decay is the target's
                v[TARGET] = 0.6 * v[TARGET] + noise(number, 3 + i) + decay * expected[i]
                expected[i] -= lr * v[TARGET]
    for p, value in zip(params, expected):
        torch.testing.assert_close(p.data, value, rtol=1e-13, atol=1e-13)


def test_a_resumed_optimizer_takes_bitwise_equal_steps():
    check_resumed(two_groups, step)


@pytest.mark.parametrize("values", [{"lr": -1}, {"momentum": -0.1}, {"momentum_target": torch.nan}])
def test_values_out_of_range_are_refused(values):
    with pytest.raises(ValueError, match="DeepKD: "):
        DeepKDOptimizer([parameter([1.0])], **{"lr": 1, **values})


def test_other_losses_are_refused():
    model = network()
    loss = model(torch.ones(1, 5)).sum()
    with pytest.raises(UserError, match="loss_nckd, loss_tckd, loss_task, this method has loss_ce, loss_kd; use"):
        DeepKDUpdate(model.parameters(), config())({"loss_ce": loss, "loss_kd": loss})
