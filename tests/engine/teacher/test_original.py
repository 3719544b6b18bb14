"""Whether a network is still as it was when its faster copy was made."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
import torch.nn as nn

from mdistiller.engine.teacher.original import Original
from mdistiller.models.cifar.resnet import resnet8

WEIGHTS, HOOKS = "its weights change during training", "it has hooks, which stored outputs skip"


def in_place(net: nn.Module) -> None:
    with torch.no_grad():
        net.layer1[0].bn1.running_mean.add_(1)


def data(net: nn.Module) -> None:
    net.fc.weight.data = net.fc.weight.data + 1


def parameter(net: nn.Module) -> None:
    net.fc.weight = nn.Parameter(net.fc.weight.detach() + 1)


def layer(net: nn.Module) -> None:
    net.layer1[0].conv2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)


def layer_without_weights(net: nn.Module) -> None:
    net.layer1[0].add_module("more", nn.Sequential(nn.Linear(2, 2)))


def buffer(net: nn.Module) -> None:
    net.fc.register_buffer("more", torch.zeros(1))


def dict_of_parameters(net: nn.Module) -> None:
    net.fc._parameters = {"weight": nn.Parameter(net.fc.weight.detach() + 1), "bias": net.fc.bias}


@pytest.mark.parametrize(
    "change", [in_place, data, parameter, layer, layer_without_weights, buffer, dict_of_parameters]
)
def test_a_weight_that_changes_or_is_another_is_seen_at_once(change: Callable[[nn.Module], None]) -> None:
    net = resnet8().eval()
    original = Original(net)
    assert original.change(thoroughly=False) == original.change(thoroughly=True) == ""
    change(net)
    assert original.change(thoroughly=False) == WEIGHTS
    assert original.change(thoroughly=False) == WEIGHTS


def test_a_change_behind_autograd_is_seen_by_a_thorough_look() -> None:
    net = resnet8().eval()
    original = Original(net)
    net.fc.weight.data.add_(1)
    assert original.change(thoroughly=False) == "" and original.change(thoroughly=True) == WEIGHTS


def test_hooks_are_seen_at_once_and_so_is_their_end() -> None:
    net = resnet8().eval()
    original = Original(net)
    for register in (
        net.layer2[0].conv1.register_forward_hook,
        net.fc.register_forward_pre_hook,
        net.fc.register_full_backward_hook,
        nn.modules.module.register_module_forward_hook,
    ):
        hook = register(lambda *_: None)
        assert original.change(thoroughly=False) == HOOKS
        hook.remove()
        assert original.change(thoroughly=False) == ""


def test_another_dict_of_hooks_is_seen_by_a_thorough_look() -> None:
    net = resnet8().eval()
    original = Original(net)
    net.fc._forward_hooks = OrderedDict({0: lambda *_: None})
    assert original.change(thoroughly=True) == HOOKS


def test_the_same_weights_in_another_layer_are_no_change_and_are_watched() -> None:
    net = resnet8().eval()
    original = Original(net)
    weight, bias = net.fc.weight, net.fc.bias
    net.fc = nn.Linear(64, 100)
    net.fc.weight, net.fc.bias = weight, bias
    assert original.change(thoroughly=False) == ""
    net.fc.register_forward_hook(lambda *_: None)
    assert original.change(thoroughly=False) == HOOKS


def test_a_step_does_not_list_the_layers_again(monkeypatch: pytest.MonkeyPatch) -> None:
    net = resnet8().eval()
    original = Original(net)
    monkeypatch.setattr(type(net), "modules", lambda self: pytest.fail("listed"))
    assert original.change(thoroughly=False) == ""
