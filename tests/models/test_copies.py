"""Copies without hooks: what they leave behind, what they keep, and that the original keeps everything."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, prune, remove_weight_norm, spectral_norm, weight_norm

from mdistiller.models.copies import copy_without_hooks, has_hooks


class Owner(nn.Module):
    """Stands for a distiller: it must not be copied with the network on which its methods are hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def note(self, *_: Any, **__: Any) -> None:
        self.calls += 1

    def __deepcopy__(self, memo: Any) -> None:
        raise AssertionError("the owner of a hook was copied")


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 2, 3)))


def image() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()


REGISTER: dict[str, Callable[[nn.Module, Any], Any]] = {
    "forward": lambda layer, hook: layer.register_forward_hook(hook),
    "forward, with kwargs": lambda layer, hook: layer.register_forward_hook(hook, with_kwargs=True),
    "forward, always called": lambda layer, hook: layer.register_forward_hook(hook, always_call=True),
    "before forward": lambda layer, hook: layer.register_forward_pre_hook(hook),
    "before forward, with kwargs": lambda layer, hook: layer.register_forward_pre_hook(hook, with_kwargs=True),
    "backward": lambda layer, hook: layer.register_full_backward_hook(hook),
    "before backward": lambda layer, hook: layer.register_full_backward_pre_hook(hook),
}
GLOBAL = {
    "forward": torch_module.register_module_forward_hook,
    "before forward": torch_module.register_module_forward_pre_hook,
    "backward": torch_module.register_module_full_backward_hook,
    "before backward": torch_module.register_module_full_backward_pre_hook,
}


@pytest.mark.parametrize("kind", REGISTER)
@pytest.mark.parametrize("place", ["", "0", "2.1"])
def test_the_hooks_of_others_stay_behind(kind: str, place: str) -> None:
    net, owner = small(), Owner()
    handle = REGISTER[kind](net.get_submodule(place), owner.note)
    assert has_hooks(net)
    twin = copy_without_hooks(net)
    assert not has_hooks(twin)
    twin(image()).sum().backward()
    assert owner.calls == 0
    net(image()).sum().backward()
    assert owner.calls == 1
    handle.remove()
    assert not has_hooks(net)


def test_the_copy_is_a_deep_copy() -> None:
    net = small()
    net[0].requires_grad_(False)
    net.eval()[2].train()
    twin = copy_without_hooks(net)
    assert type(twin) is nn.Sequential and torch.equal(twin(image()), net(image()))
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in net.parameters()]
    assert [m.training for m in twin.modules()] == [m.training for m in net.modules()]
    assert {id(t) for t in net.state_dict(keep_vars=True).values()}.isdisjoint(
        id(t) for t in twin.state_dict(keep_vars=True).values()
    )
    tied = nn.Sequential(net[2], net[2])
    copied = copy_without_hooks(tied)
    assert copied[0] is copied[1]


@pytest.mark.parametrize("hook", [lambda *_: None, partial(Owner().note, 1), Owner()])
def test_what_a_hook_holds_is_not_copied(hook: Any) -> None:
    net = small()
    net[0].register_forward_hook(hook)
    assert not has_hooks(copy_without_hooks(net))


def test_the_original_keeps_its_hooks_if_copying_fails() -> None:
    net, owner = small(), Owner()
    for register in REGISTER.values():
        register(net[0], owner.note)
    net.attached = [owner]  # cannot be copied
    hooks = [[*getattr(net[0], name).values()] for name in vars(net[0]) if name.endswith("_hooks")]
    with pytest.raises(AssertionError, match="was copied"):
        copy_without_hooks(net)
    assert hooks == [[*getattr(net[0], name).values()] for name in vars(net[0]) if name.endswith("_hooks")]
    net(image()).sum().backward()
    assert owner.calls == len(REGISTER)


def test_the_copy_takes_backward_hooks_of_either_kind() -> None:
    net, owner = small(), Owner()
    net[0].register_full_backward_hook(owner.note)
    copy_without_hooks(net)[0].register_backward_hook(owner.note)
    with pytest.raises(RuntimeError, match="Cannot use both"):
        net[0].register_backward_hook(owner.note)


def test_a_handle_that_the_network_holds() -> None:
    net, owner = small(), Owner()
    net.handle = net[0].register_forward_hook(owner.note, with_kwargs=True)
    twin = copy_without_hooks(net)
    twin.handle.remove()
    assert has_hooks(net)
    net.handle.remove()
    assert not has_hooks(net)


@pytest.mark.parametrize("kind", GLOBAL)
def test_hooks_of_all_modules(kind: str) -> None:
    net = small()
    assert not has_hooks(net)
    handle = GLOBAL[kind](lambda *_: None)
    try:
        assert has_hooks(net)
    finally:
        handle.remove()
    assert not has_hooks(net)


class Half(prune.BasePruningMethod):
    """A pruning method of the user's."""

    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: torch.Tensor, default_mask: torch.Tensor) -> torch.Tensor:
        return default_mask * (torch.arange(t.numel()).reshape(t.shape) % 2)


def old_weight_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        weight_norm(layer)


NORMED: dict[str, Callable[[nn.Module], Any]] = {
    "weight norm": old_weight_norm,
    "spectral norm": spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    "pruned twice": lambda layer: [Half.apply(layer, "weight"), prune.random_unstructured(layer, "weight", amount=2)],
    "pruned in a user's way": lambda layer: Half.apply(layer, "weight"),
}


@pytest.mark.parametrize("change", NORMED)
@pytest.mark.parametrize("ran", [False, True])
def test_hooks_that_compute_weights_stay(change: str, ran: bool) -> None:
    """The copy follows its own parameters, as the original does, also if copied after a pass."""
    net, owner = small(), Owner()
    NORMED[change](net[0])
    net[0].register_forward_pre_hook(owner.note)
    if ran:
        net(image()).sum().backward()
        owner.calls = 0
    assert has_hooks(net)
    twin = copy_without_hooks(net)
    before = [net.eval()(image()), twin.eval()(image())]
    assert torch.equal(*before) and owner.calls == 1
    with torch.no_grad():
        for name, p in twin[0].named_parameters():
            if name.startswith("weight"):
                p.add_(torch.randn(p.shape))
    assert torch.equal(net(image()), before[0]) and not torch.equal(twin(image()), before[0])
    net.load_state_dict(twin.state_dict())
    assert torch.equal(net(image()), twin(image()))
    twin(image()).sum().backward()
    assert all(p.grad is not None for p in twin.parameters())


def test_the_hook_of_weight_norm_can_be_removed_from_the_copy() -> None:
    net = small()
    old_weight_norm(net[0])
    twin = copy_without_hooks(net)
    remove_weight_norm(twin[0])
    assert not has_hooks(twin) and has_hooks(net)
    assert torch.allclose(twin.eval()(image()), net.eval()(image()))


def test_parametrizations_need_no_hook() -> None:
    net = small()
    parametrizations.weight_norm(net[0])
    parametrizations.orthogonal(net[2][1])
    assert not has_hooks(net)
    twin = copy_without_hooks(net)
    assert torch.equal(twin(image()), net(image()))
    with torch.no_grad():
        twin[0].parametrizations.weight.original0.mul_(2)
    assert not torch.equal(twin.eval()(image()), net.eval()(image()))


class Records(nn.Module):
    """A network whose forward reads what its own hook has kept."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 2, 1)
        self.inner.register_forward_hook(self.keep)
        self.inner.register_forward_hook(partial(self.keep_twice))

    def keep(self, layer: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.kept = output

    def keep_twice(self, layer: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.twice = 2 * output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inner(x)
        return self.kept + self.twice


def test_methods_of_the_network_itself_become_methods_of_the_copy() -> None:
    net = Records()
    twin = copy_without_hooks(net)
    with torch.no_grad():
        net.inner.weight.zero_()
        net.inner.bias.zero_()
    assert twin(image()).any() and not hasattr(net, "kept")
    assert not net(image()).any() and twin.kept.any()
    assert not has_hooks(copy_without_hooks(net.inner))  # here they are methods of another


def test_a_lazy_network_stays_lazy() -> None:
    net = nn.Sequential(nn.LazyConv2d(2, 3))
    twin = copy_without_hooks(net)
    assert twin(image()).shape == (2, 2, 6, 6)
    assert type(twin[0]) is nn.Conv2d and type(net[0]) is nn.LazyConv2d
    assert not has_hooks(twin)


class Named(nn.Module):
    """A network whose own hooks rename its state."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.mark = "first"
        self.register_state_dict_post_hook(partial(self.save))  # torch takes no bare method here
        self.register_load_state_dict_pre_hook(type(self).load)

    def save(self, module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        state[f"{self.mark}.weight"] = state.pop("inner.weight")

    def load(self, state: dict[str, Any], *_: Any) -> None:
        state["inner.weight"] = state.pop(f"{self.mark}.weight")


def test_the_state_dicts_hooks_stay() -> None:
    net = Named()
    twin = copy_without_hooks(net)
    twin.mark = "second"
    assert sorted(net.state_dict()) == ["first.weight", "inner.bias"]
    assert sorted(twin.state_dict()) == ["inner.bias", "second.weight"]
    twin.load_state_dict({"second.weight": torch.ones(2, 2), "inner.bias": torch.zeros(2)})
    assert torch.equal(twin.inner.weight, torch.ones(2, 2)) and not torch.equal(net.inner.weight, torch.ones(2, 2))


STATE: dict[str, Callable[[nn.Module, Any], Any]] = {
    "after saving": lambda net, hook: net._register_state_dict_hook(hook),
    "before saving": lambda net, hook: net.register_state_dict_pre_hook(hook),
    "before loading": lambda net, hook: net.register_load_state_dict_pre_hook(hook),
    "after loading": lambda net, hook: net.register_load_state_dict_post_hook(hook),
}


@pytest.mark.parametrize("kind", STATE)
@pytest.mark.parametrize("wrap", [lambda hook: hook, partial], ids=["method", "partial"])
def test_a_state_dict_hook_of_another_owner_is_shared(kind: str, wrap: Callable[[Any], Any]) -> None:
    net, owner = small(), Owner()
    STATE[kind](net, wrap(owner.note))
    assert not has_hooks(net)
    twin = copy_without_hooks(net)
    twin.load_state_dict(twin.state_dict())
    assert owner.calls == 1
    net.load_state_dict(net.state_dict())
    assert owner.calls == 2


def test_deepcopy_would_copy_the_owner() -> None:
    """What this module is for."""
    net = small()
    net[0].register_forward_hook(Owner().note)
    with pytest.raises(AssertionError, match="was copied"):
        copy.deepcopy(net)
