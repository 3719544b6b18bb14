"""The two update rules against explicit training loops."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from mdistiller.engine.dot import KD, DistillationOrientedTrainer
from mdistiller.engine.lr_schedule import adjust_learning_rate
from mdistiller.engine.split_update import AlignedUpdate, DotUpdate
from mdistiller.engine.update import SumUpdate
from mdistiller.errors import UserError

from ._small import config, network


def losses(model: nn.Module, step: int) -> dict[str, torch.Tensor]:
    """A task loss and two distillation losses on one graph; one of them has the shape (1,)."""
    g, device = torch.Generator().manual_seed(step), next(model.parameters()).device
    logits = model(torch.randn(8, 5, generator=g).to(device))
    return {
        "loss_ce": F.cross_entropy(logits, torch.randint(0, 3, (8,), generator=g).to(device)),
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


class Heated(nn.Module):
    """The small network and a temperature, whose gradient is zero while it does not scale the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.temperature = nn.Parameter(torch.tensor(4.0))

    def learnable(self) -> list:
        """Two plain parameters around a group without decay, and one at a tenth of the learning rate 0.1."""
        first, first_bias, last, last_bias = self.net.parameters()
        slow = {"params": iter([first_bias, last_bias]), "lr": 0.01}
        return [first, {"params": self.temperature, "weight_decay": 0.0}, last, slow]

    def groups(self) -> list[dict]:
        """The same for torch.optim."""
        first, first_bias, last, last_bias = self.net.parameters()
        return [
            {"params": [first, last]},
            {"params": [self.temperature], "weight_decay": 0.0},
            {"params": [first_bias, last_bias], "lr": 0.01},
        ]

    def losses(self, step: int, used: float = 1.0) -> dict[str, torch.Tensor]:
        """`used` 0: the temperature takes part, with gradient 0."""
        terms = losses(self.net, step)
        terms["loss_kd"] = terms["loss_kd"] * (1 + used * (self.temperature / 4 - 1))
        return terms


RULES = {
    "SGD": (SumUpdate, {}), "AdamW": (SumUpdate, {"TYPE": "AdamW"}), "DOT": (DotUpdate, {}),
    "aligned": (AlignedUpdate, {}),
}  # fmt: skip


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("rule", ["SGD", "AdamW"])
def test_groups_against_torch_with_the_same_groups(rule, clip):
    """Bitwise; clipping takes the norm over all groups together."""
    ours, theirs = Heated(), Heated()
    update = SumUpdate(ours.learnable(), config(CLIP_GRAD_NORM=clip, **RULES[rule][1]))
    assert len(update.parameters) == 5 and {id(p) for p in update.parameters} == {id(p) for p in ours.parameters()}
    make = {
        "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01),
        "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.01),
    }
    optimizer = make[rule](theirs.groups())
    for step in range(4):
        update.backward(ours.losses(step))
        norm = update.norm()
        update.step(norm)
        optimizer.zero_grad()
        terms = theirs.losses(step)
        (terms["loss_ce"] + terms["loss_kd"].squeeze() + terms["loss_feat"]).backward()
        expected = torch.cat([p.grad.flatten() for p in theirs.parameters()]).norm()
        torch.testing.assert_close(norm, expected)
        if clip:
            # In the order of the groups: a float32 norm depends on the order of its terms.
            torch.nn.utils.clip_grad_norm_([p for group in theirs.groups() for p in group["params"]], clip)
        optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters()))


def test_dots_groups_against_one_backward_pass_per_kind_of_loss():
    ours, theirs = Heated(), Heated()
    update = DotUpdate(ours.learnable(), config())
    own = {id(p): group for group in theirs.groups() for p in group["params"]}
    v_task: dict = {id(p): 0.0 for p in theirs.parameters()}
    v_kd = dict(v_task)
    for step in range(4):
        update.backward(ours.losses(step))
        norm = update.norm()
        update.step(norm)
        params = list(theirs.parameters())
        kd, task = theirs.losses(step), theirs.losses(step)["loss_ce"]
        g_kd = torch.autograd.grad(kd["loss_kd"].sum() + kd["loss_feat"], params)
        g_task = torch.autograd.grad(task, params, allow_unused=True)
        total = [g if t is None else g + t for g, t in zip(g_kd, g_task)]
        torch.testing.assert_close(norm, torch.cat([g.flatten() for g in total]).norm())
        with torch.no_grad():
            for p, kd_grad, task_grad in zip(params, g_kd, g_task):
                group = own[id(p)]
                lr, decay = group.get("lr", 0.1), group.get("weight_decay", 0.01)
                if task_grad is None:  # the temperature: the mean of both momenta
                    v_kd[id(p)] = 0.9 * v_kd[id(p)] + kd_grad
                    p -= lr * v_kd[id(p)]
                    continue
                v_task[id(p)] = (0.9 - 0.075) * v_task[id(p)] + task_grad + decay * p
                v_kd[id(p)] = (0.9 + 0.075) * v_kd[id(p)] + kd_grad
                p -= lr * (v_task[id(p)] + v_kd[id(p)])
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_a_temperature_without_decay_stays_where_it_is_while_its_gradient_is_zero(rule):
    update_rule, solver = RULES[rule]
    grouped, plain = Heated(), Heated()
    for model, learnable in ((grouped, grouped.learnable()), (plain, plain.parameters())):
        update = update_rule(learnable, config(**solver))
        for step in range(5):
            update(model.losses(step, used=0.0))
    assert grouped.temperature.item() == 4.0
    assert plain.temperature.item() < 3.995, "decay alone moves it"
    assert not torch.equal(grouped.net[0].weight, network()[0].weight)


def test_the_loss_scale_of_fp16_works_with_groups():
    """On a CPU all numbers are float32, and the loss scale is a power of two: it cancels exactly."""
    scaled, exact = Heated(), Heated()
    for model, amp in ((scaled, "fp16"), (exact, "none")):
        update = SumUpdate(model.learnable(), config(AMP=amp, CLIP_GRAD_NORM=0.5))
        for step in range(3):
            update(model.losses(step))
    assert all(torch.equal(p, q) for p, q in zip(scaled.parameters(), exact.parameters()))


def trained(rule: str, path: Path | None, steps: range) -> tuple[Heated, SumUpdate]:
    """A model trained for `steps` of a decaying schedule, from the state in `path` if there is one."""
    update_rule, solver = RULES[rule]
    model = Heated()
    cfg = config(LR_DECAY_STAGES=[2, 4], EPOCHS=6, **solver)
    update = update_rule(model.learnable(), cfg)
    if path is not None:
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        update.load_state_dict(state)
    for step in steps:
        adjust_learning_rate(step + 1, cfg, update.optimizer)
        update(model.losses(step))
    return model, update


@pytest.mark.parametrize("rule", RULES)
def test_groups_resume_bit_for_bit(rule, tmp_path):
    whole, of_whole = trained(rule, None, range(6))
    half, update = trained(rule, None, range(3))
    torch.save({"model": half.state_dict(), **update.state_dict()}, tmp_path / "latest")
    resumed, of_resumed = trained(rule, tmp_path / "latest", range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters()))
    states = [update.state_dict()["optimizer"] for update in (of_whole, of_resumed)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for ours, theirs in zip(states[0]["state"].values(), states[1]["state"].values()):
        assert all(torch.equal(torch.as_tensor(ours[k]), torch.as_tensor(theirs[k])) for k in ours)


def test_a_resumed_run_keeps_its_own_groups_shares_of_the_learning_rate():
    """Also from a checkpoint of the same groups without a share of their own."""
    model, other = Heated(), Heated()
    update, plain = SumUpdate(model.learnable(), config()), SumUpdate(other.learnable()[:-1], config())
    of_plain = plain.state_dict()
    of_plain["optimizer"]["param_groups"].append({**of_plain["optimizer"]["param_groups"][0], "params": [3, 4]})
    update.load_state_dict(of_plain)
    cfg = config()
    assert adjust_learning_rate(1, cfg, update.optimizer) == 0.1
    assert [group["lr"] for group in update.optimizer.param_groups] == pytest.approx([0.1, 0.1, 0.01], rel=1e-12)


def test_a_state_of_another_number_of_groups_is_refused():
    model = Heated()
    state = SumUpdate(model.parameters(), config()).state_dict()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        SumUpdate(model.learnable(), config()).load_state_dict(state)


@pytest.mark.parametrize("rule", RULES)
def test_a_parameter_in_two_groups_is_refused_by_position(rule):
    model, (update_rule, solver) = Heated(), RULES[rule]
    with pytest.raises(ValueError, match="parameter 0 of group 5 is entry 0 again"):
        update_rule([*model.parameters(), {"params": [model.temperature]}], config(**solver))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rule", RULES)
def test_groups_on_a_gpu_take_the_steps_of_the_cpu(rule):
    """With the optimizer's fused kernels, which serve every group."""
    update_rule, solver = RULES[rule]
    on_gpu, on_cpu = Heated().cuda(), Heated()
    updates = [update_rule(model.learnable(), config(**solver)) for model in (on_gpu, on_cpu)]
    assert rule == "DOT" or all(group["fused"] for group in updates[0].optimizer.param_groups)
    for step in range(3):
        for update, model in zip(updates, (on_gpu, on_cpu)):
            update(model.losses(step))
    for p, q in zip(on_gpu.parameters(), on_cpu.parameters()):
        torch.testing.assert_close(p.cpu(), q, rtol=1e-4, atol=1e-5)


def test_dot_takes_the_branches_cross_entropy_for_a_task_loss():
    """DCGD's `loss_multi_ce`: without momentum for the task, its gradient leaves no trace in the buffers."""
    model = network()
    update = DotUpdate(model.parameters(), config(MOMENTUM=0.075, WEIGHT_DECAY=0.0))  # momenta of 0 and 0.15
    out = model(torch.ones(2, 5))
    kd, task = out.square().mean(), out.mean()
    g_kd = torch.autograd.grad(kd, list(model.parameters()), retain_graph=True)
    g_task = torch.autograd.grad(task, list(model.parameters()), retain_graph=True)
    update.backward({"loss_multi_kd": kd, "loss_multi_ce": task})
    for p, expected_kd, expected_task in zip(model.parameters(), g_kd, g_task):
        assert torch.equal(update.kept.of(KD)[p], expected_kd) and torch.equal(p.grad, expected_task)
