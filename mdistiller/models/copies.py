"""Copies of networks that leave behind what others have hooked on them.

A hook belongs to whoever registered it, for the one network on which it was registered. `copy.deepcopy` copies it too
and, if it is a method of another object, that whole object.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch.nn as nn
from torch import Tensor
from torch.nn.modules import module as torch_module

from .taps import Tap, others

Hook = Callable[..., Any]
# Attributes of nn.Module: the hooks of a forward or backward pass by their numbers, and facts about hooks by number.
PASS_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOK_FACTS = ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def has_hooks(network: nn.Module) -> bool:
    """Whether a forward or backward hook or pre-hook runs with `network`: of a submodule, or of all torch modules.

    torch.nn.utils.weight_norm and spectral_norm work by such hooks; torch.nn.utils.parametrizations does not. A tap of
    a wrapped network is not counted, see `taps`.
    """
    # Without map and attrgetter, which torch.compile cannot follow.
    return has_hooks_everywhere() or any(
        others(getattr(layer, name)) for layer in network.modules() for name in PASS_HOOKS
    )


def has_hooks_everywhere() -> bool:
    """Whether a forward or backward hook or pre-hook of all torch modules is registered."""
    return any(getattr(torch_module, f"_global{name}") for name in PASS_HOOKS)


def copy_without_hooks(network: nn.Module) -> nn.Module:
    """A deep copy of `network` without the hooks that others have registered on it. `network` keeps all of them.

    Forward and backward hooks and pre-hooks are left out, and so is what they hold. Three kinds stay, because without
    them the copy would compute something else: those of torch.nn.utils (weight_norm, spectral_norm, pruning), which
    compute a layer's weights, methods of the network's own modules, which become methods of the copy, and the taps of
    a wrapped network, which become taps of its copy.

    The hooks of state dicts stay, as the checkpoints are those of the network. One of another owner is shared.
    """
    layers = list(network.modules())
    # deepcopy takes what its memo holds for an object's id, instead of a copy of the object.
    memo: dict[int, Any] = {}
    for layer in layers:
        memo.update({id(getattr(layer, name)): OrderedDict() for name in (*PASS_HOOKS, *_HOOK_FACTS)})
        memo.update({id(hook): hook for hook in _state_hooks(layer) if not _is_own(hook, layers)})
        memo.update({id(tensor): tensor.detach().clone() for tensor in _computed(layer)})
    twin = copy.deepcopy(network, memo)
    for layer in layers:
        _copy_own_hooks(layer, layers, memo)
    for layer in twin.modules():
        if not layer._backward_hooks:
            layer._is_full_backward_hook = None  # a hook of either kind may come
    return twin


def _copy_own_hooks(layer: nn.Module, layers: Sequence[nn.Module], memo: dict[int, Any]) -> None:
    """Fill the copy's empty dicts of hooks with copies of those that stay."""
    own = {number for name in PASS_HOOKS for number, hook in getattr(layer, name).items() if _is_own(hook, layers)}
    for name in (*PASS_HOOKS, *_HOOK_FACTS):
        hooks = getattr(layer, name)
        kept = {number: entry for number, entry in hooks.items() if number in own}
        memo[id(hooks)].update(copy.deepcopy(kept, memo))


def _is_own(hook: Hook, layers: Sequence[nn.Module]) -> bool:
    """Whether a hook is a tap, a method of one of `layers`, or from torch.nn.utils or a class derived from its classes.

    A pruning method of the user's is such a class.
    """
    if isinstance(hook, Tap):
        return True
    method = hook.func if isinstance(hook, partial) else hook
    owner = getattr(method, "__self__", None)
    origins = [getattr(origin, "__module__", None) or "" for origin in (hook, *type(hook).__mro__)]
    return any(owner is layer for layer in layers) or any(name.startswith("torch.nn.utils.") for name in origins)


def _state_hooks(layer: nn.Module) -> Iterator[Hook]:
    """Without the wrapper that torch puts around some, which refers to the layer and must be copied with it."""
    for name in _STATE_HOOKS:
        for hook in getattr(layer, name).values():
            yield hook.hook if isinstance(hook, torch_module._WrappedHook) else hook


def _computed(layer: nn.Module) -> Iterator[Tensor]:
    """Tensors inside an autograd graph, which deepcopy refuses, such as the weight that weight_norm has computed."""
    return (value for value in vars(layer).values() if isinstance(value, Tensor) and not value.is_leaf)
