"""An optimizer that is resumed with other settings, against the continuation by hand, in another layout, on a GPU."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode as CN

from mdistiller.engine.split_update import DotUpdate
from mdistiller.engine.update import SumUpdate

from ._small import config, network

OLD = {"WEIGHT_DECAY": 0.01, "MOMENTUM": 0.9, "BETAS": [0.9, 0.99]}
NEW = {"WEIGHT_DECAY": 0.3, "MOMENTUM": 0.5, "BETAS": [0.6, 0.7], "DOT": CN({"DELTA": 0.25})}
RULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (SumUpdate, {}), "AdamW": (SumUpdate, {"TYPE": "AdamW"}), "DOT": (DotUpdate, {}),
}  # fmt: skip


def losses(model: nn.Module, step: int) -> dict[str, Tensor]:
    """A task loss and a distillation loss."""
    g, like = torch.Generator().manual_seed(step), next(model.parameters())
    logits = model(torch.randn(8, 5, generator=g).to(like))
    target = torch.randint(0, 3, (8,), generator=g).to(like.device)
    return {"loss_ce": F.cross_entropy(logits, target), "loss_kd": logits.pow(2).mean()}


def update_of(rule: str, model: nn.Module, settings: dict[str, Any], own_decay: float) -> Any:
    """An update of the model's parameters; the last one, a group of its own, has a weight decay of its own."""
    update, more = RULES[rule]
    *first, last = model.parameters()
    return update([*first, {"params": [last], "weight_decay": own_decay}], config(**settings, **more))


def gradients(model: nn.Module, step: int, *names: str) -> list[Tensor]:
    """Of the sum of the losses `names`."""
    with torch.enable_grad():
        terms = losses(model, step)
        return list(torch.autograd.grad(torch.stack([terms[name] for name in names]).sum(), list(model.parameters())))


def sgd(model: nn.Module, state: list[dict[str, Any]], step: int, decays: list[float]) -> None:
    grads = gradients(model, step, "loss_ce", "loss_kd")
    with torch.no_grad():
        for p, g, own, decay in zip(model.parameters(), grads, state, decays, strict=True):
            own["momentum_buffer"] = 0.5 * own["momentum_buffer"] + g + decay * p
            p -= 0.1 * own["momentum_buffer"]


def adamw(model: nn.Module, state: list[dict[str, Any]], step: int, decays: list[float]) -> None:
    grads = gradients(model, step, "loss_ce", "loss_kd")
    with torch.no_grad():
        for p, g, own, decay in zip(model.parameters(), grads, state, decays, strict=True):
            own["step"] = own["step"] + 1
            own["exp_avg"] = 0.6 * own["exp_avg"] + 0.4 * g
            own["exp_avg_sq"] = 0.7 * own["exp_avg_sq"] + 0.3 * g * g
            count = float(own["step"])
            mean, square = own["exp_avg"] / (1 - 0.6**count), own["exp_avg_sq"] / (1 - 0.7**count)
            p -= 0.1 * decay * p + 0.1 * mean / (square.sqrt() + 1e-8)


def dot(model: nn.Module, state: list[dict[str, Any]], step: int, decays: list[float]) -> None:
    task, kd = gradients(model, step, "loss_ce"), gradients(model, step, "loss_kd")
    with torch.no_grad():
        for p, g, d, own, decay in zip(model.parameters(), task, kd, state, decays, strict=True):
            own["momentum_buffer"] = 0.25 * own["momentum_buffer"] + g + decay * p
            own["momentum_kd_buffer"] = 0.75 * own["momentum_kd_buffer"] + d
            p -= 0.1 * (own["momentum_buffer"] + own["momentum_kd_buffer"])


BY_HAND = {"SGD": sgd, "AdamW": adamw, "DOT": dot}


@pytest.mark.parametrize("rule", RULES)
def test_the_settings_are_those_of_the_configuration(rule: str, tmp_path: Path) -> None:
    """Three steps with the old settings, then two with the new ones: equal to the formulas, continued by hand."""
    model = network().double()
    update = update_of(rule, model, OLD, own_decay=0.0)
    for step in range(3):
        update(losses(model, step))
    torch.save(update.state_dict(), tmp_path / "latest")
    by_hand = copy.deepcopy(model)
    remembered = [copy.deepcopy(update.optimizer.state[p]) for p in model.parameters()]

    resumed = update_of(rule, model, NEW, own_decay=0.05)
    fresh = [dict(group) for group in resumed.optimizer.param_groups]
    resumed.load_state_dict(torch.load(tmp_path / "latest", weights_only=True))
    for before, group in zip(fresh, resumed.optimizer.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in before.items() if k != "params"}
    for step in (3, 4):
        resumed(losses(model, step))
        BY_HAND[rule](by_hand, remembered, step, [0.3, 0.3, 0.3, 0.05])
    for p, q in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_kernels_and_signs_are_not_the_checkpoints() -> None:
    update, other = (update_of("AdamW", network(), OLD, 0.0) for _ in range(2))
    update(losses(network(), 0))
    state = update.state_dict()
    foreign = {"fused": True, "foreach": True, "capturable": True, "differentiable": True, "maximize": True}
    for group in state["optimizer"]["param_groups"]:
        group |= foreign
    before = [{name: group[name] for name in foreign} for group in other.optimizer.param_groups]
    other.load_state_dict(state)
    assert [{name: group[name] for name in foreign} for group in other.optimizer.param_groups] == before
    assert not any(any(group.values()) for group in before)


def small_conv(layout: torch.memory_format) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 3)).to(memory_format=layout)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layouts", [(torch.contiguous_format, torch.channels_last)[::way] for way in (1, -1)])
def test_momentum_takes_the_memory_layout_of_its_parameter(rule: str, layouts: Any) -> None:
    models = [small_conv(layout) for layout in layouts]
    saved, resumed = (update_of(rule, model, OLD, 0.0) for model in models)
    logits = models[0](torch.randn(6, 3, 3, 3))
    saved({"loss_ce": F.cross_entropy(logits, torch.arange(6) % 3), "loss_kd": logits.pow(2).mean()})
    resumed.load_state_dict(saved.state_dict())
    assert models[0][0].weight.stride() != models[1][0].weight.stride()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        before, after = saved.optimizer.state[p], resumed.optimizer.state[q]
        assert before.keys() == after.keys() and before
        for key, value in after.items():
            assert torch.equal(value, before[key])
            assert value.shape != q.shape or value.stride() == q.stride()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rule", RULES)
def test_a_run_goes_on_on_the_other_device(rule: str) -> None:
    """From the CPU to the GPU, whose kernels are fused, and back."""
    for devices in (("cpu", "cuda"), ("cuda", "cpu")):
        models = [network().to(device) for device in devices]
        saved, resumed = (update_of(rule, model, OLD, 0.0) for model in models)
        saved(losses(models[0], 0))
        models[1].load_state_dict(models[0].state_dict())
        resumed.load_state_dict(saved.state_dict())
        for update, model in ((saved, models[0]), (resumed, models[1])):
            update(losses(model, 1))
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(p.cpu(), q.cpu(), rtol=1e-5, atol=1e-6)
