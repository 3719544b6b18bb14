"""DOT's optimizer against recorded updates, plain SGD and steps computed by hand."""

from __future__ import annotations

import copy

import pytest
import torch

from mdistiller.engine.dot import DistillationOrientedTrainer

from .. import _golden


def parameter(values: object) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))


def give(params: dict[str, torch.nn.Parameter], grads: dict[str, object]) -> None:
    for name, p in params.items():
        p.grad = torch.tensor(grads[name], dtype=torch.float64) if name in grads else None


@pytest.mark.parametrize("case", _golden.load("dot_optimizer"), ids=lambda case: f"delta {case['delta']}")
@pytest.mark.parametrize("one_group", [True, False])
def test_recorded_steps(case, one_group):
    params = {name: parameter(values) for name, values in case["init"].items()}
    groups = list(params.values()) if one_group else [{"params": [p]} for p in params.values()]
    optimizer = DistillationOrientedTrainer(
        groups,
        lr=case["lr"],
        momentum=case["momentum"] - case["delta"],
        momentum_kd=case["momentum"] + case["delta"],
        weight_decay=case["weight_decay"],
    )
    for step in case["steps"]:
        give(params, step["kd_grad"])
        optimizer.step_kd()
        give(params, step["task_grad"])
        optimizer.step()
        for name, p in params.items():
            after = torch.tensor(step["after"][name], dtype=torch.float64)
            torch.testing.assert_close(p.data, after, rtol=1e-12, atol=1e-12)


def noise(step: int, place: int) -> torch.Tensor:
    return torch.randn(3, 2, generator=torch.Generator().manual_seed(10 * step + place), dtype=torch.float64)


def two_groups() -> tuple[list[torch.nn.Parameter], DistillationOrientedTrainer]:
    params = [torch.nn.Parameter(noise(99, i)) for i in range(3)]
    groups = [
        {"params": params[:1], "lr": 0.5, "weight_decay": 0.0},
        {"params": params[1:], "momentum": 0.5, "momentum_kd": 0.7},
    ]
    return params, DistillationOrientedTrainer(groups, lr=0.1, momentum=0.8, momentum_kd=0.95, weight_decay=0.01)


def step(params: list[torch.nn.Parameter], optimizer: DistillationOrientedTrainer, number: int) -> None:
    """The first parameter gets the task gradient, the second both, the third the distillation gradient."""
    params[0].grad = None
    params[1].grad, params[2].grad = noise(number, 0), noise(number, 1)
    optimizer.step_kd()
    params[0].grad, params[1].grad, params[2].grad = noise(number, 2), noise(number, 3), None
    optimizer.step()


def test_groups_keep_their_own_values():
    params, optimizer = two_groups()
    expected = [p.detach().clone() for p in params]
    v_task, v_kd = torch.zeros(3, 2).double(), torch.zeros(3, 2).double()
    alone = [torch.zeros(3, 2).double(), torch.zeros(3, 2).double()]
    for number in range(3):
        step(params, optimizer, number)
        alone[0] = (0.8 + 0.95) / 2 * alone[0] + noise(number, 2)
        expected[0] -= 0.5 * alone[0]
        v_task = 0.5 * v_task + noise(number, 3) + 0.01 * expected[1]
        v_kd = 0.7 * v_kd + noise(number, 0)
        expected[1] -= 0.1 * (v_task + v_kd)
        alone[1] = (0.5 + 0.7) / 2 * alone[1] + noise(number, 1) + (0.01 * expected[2] if number else 0)
        expected[2] -= 0.1 * alone[1]
    for p, value in zip(params, expected):
        torch.testing.assert_close(p.data, value, rtol=1e-13, atol=1e-13)


def check_resumed(two_groups, step):
    """An optimizer that takes up the state of another one takes bitwise equal steps; returns it.

    Args:
        two_groups: -> its parameters and the optimizer.
        step: (parameters, optimizer, number of the step): takes one.
    """
    params, optimizer = two_groups()
    for number in range(2):
        step(params, optimizer, number)
    again, resumed = two_groups()
    for p, q in zip(again, params):
        p.data.copy_(q.data)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for number in range(2, 4):
        step(params, optimizer, number)
        step(again, resumed, number)
    assert all(torch.equal(p, q) for p, q in zip(params, again))
    return resumed


def test_a_resumed_optimizer_takes_bitwise_equal_steps():
    resumed = check_resumed(two_groups, step)
    copy.deepcopy(resumed).step_kd()  # a copy works too


@pytest.mark.parametrize("nesterov", [False, True])
def test_dot_with_the_task_loss_alone_is_sgd(nesterov):
    """With equal momenta and no distillation, DOT is torch's SGD."""
    ours, theirs = torch.nn.Parameter(noise(0, 0)), torch.nn.Parameter(noise(0, 0))
    dot = DistillationOrientedTrainer(
        [ours], lr=0.1, momentum=0.9, momentum_kd=0.9, weight_decay=0.1, nesterov=nesterov
    )
    sgd = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=nesterov)
    for number in range(4):
        ours.grad, theirs.grad = noise(number, 1), noise(number, 1)
        dot.step()
        sgd.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


def test_dampening_against_values_by_hand():
    p = parameter([1.0])
    dot = DistillationOrientedTrainer([p], lr=1.0, momentum=0.5, momentum_kd=0.25, dampening=0.1)
    for kd, task, after in (
        (1.0, 2.0, -2.0),  # buffers start undampened: v_kd 1, v_task 2; 1 - 3
        (1.0, 2.0, -5.95),  # v_kd 0.25 + 0.9 = 1.15, v_task 1 + 1.8 = 2.8; -2 - 3.95
    ):
        p.grad = torch.full((1,), kd, dtype=torch.float64)
        dot.step_kd()
        assert p.grad is None
        p.grad = torch.full((1,), task, dtype=torch.float64)
        dot.step()
        assert p.item() == pytest.approx(after, abs=1e-15)


def test_a_gradient_missing_in_one_step_counts_as_zero():
    p = parameter([0.0])
    dot = DistillationOrientedTrainer([p], lr=1.0, momentum=0.5, momentum_kd=0.75)
    p.grad = torch.ones(1, dtype=torch.float64)
    dot.step_kd()
    p.grad = torch.ones(1, dtype=torch.float64)
    dot.step()  # v_task 1, v_kd 1, p -2
    p.grad = torch.ones(1, dtype=torch.float64)
    dot.step()  # v_task 1.5, v_kd 0.75
    assert p.item() == pytest.approx(-4.25, abs=1e-15)


def test_parameters_without_gradient_do_not_change():
    p = parameter([1.0])
    dot = DistillationOrientedTrainer([p], lr=1.0, momentum=0.5, momentum_kd=0.5, weight_decay=1.0)
    dot.step_kd()
    dot.step()
    assert p.item() == 1.0
    assert not dot.state_dict()["state"]


@pytest.mark.parametrize("values", [{"lr": -1}, {"momentum": -0.1}, {"momentum_kd": torch.nan}, {"nesterov": True}])
def test_values_out_of_range_are_refused(values):
    with pytest.raises(ValueError, match="DOT"):
        DistillationOrientedTrainer([parameter([1.0])], **{"lr": 1, **values})
