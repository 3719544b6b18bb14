"""The networks of a caller: modules of their own, which stay theirs, and names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from yacs.config import CfgNode as CN

from ..console import one_line
from ..dataset import info_of
from ..distillers import Distiller, RunFacts, distiller_dict, logits_of
from ..engine.cfg import CFG
from ..engine.networks import Named, frozen_teacher, starting_student
from ..engine.overrides import setting
from ..engine.runtime.seeds import random_state, set_random_state
from ..errors import UserError
from ..models.native import NativeInput
from ..models.own_input import OwnInput, with_own_input
from ..models.returned import Doubt, described, explained, returned, tried
from ..models.taps import remove_taps, tap_numbers
from ..models.wrapped import WrappedNetwork, wrap

Given = nn.Module | str | None


def name_of(given: Given) -> str:
    """What config.yaml calls a network: its name, or the class of a module."""
    if isinstance(given, nn.Module):
        return type(given).__name__
    return given or "none"


def bare(network: nn.Module) -> nn.Module:
    """The network that a caller knows: without the wrapper that makes it return features."""
    for wrapper in (OwnInput, WrappedNetwork):
        if isinstance(network, wrapper):
            network = network.network if isinstance(network, OwnInput) else network.bare
    return network


def as_given(network: nn.Module, given: Given) -> nn.Module:
    """A method's network in the form in which the caller gave it: with the wrapper, if that was given.

    Args:
        given: what the caller gave, of which `network` may be a copy; a name or None: without the wrapper.
    """
    if isinstance(network, OwnInput):
        network = network.network
    return network if isinstance(given, WrappedNetwork) else bare(network)


def released(network: nn.Module, given: Given) -> nn.Module:
    """`as_given`, when the training has ended: a network that was made for it, as a copy is, loses its hooks too."""
    own = as_given(network, given)
    if own is not given and not isinstance(own, WrappedNetwork):
        remove_taps(own)
    return own


def check_given(given: Any, role: str) -> None:
    """Refuse what is neither a module nor a name.

    Raises:
        UserError: names the role and what to give.
    """
    if given is None or isinstance(given, str):
        return
    if isinstance(given, type) and issubclass(given, nn.Module):
        raise UserError(f"the {role} is the class {given.__name__}; give it a network: {given.__name__}()")
    if not isinstance(given, nn.Module):
        raise UserError(
            f"the {role} is {one_line(given, 60)}; give it a network (torch.nn.Module) or a name, such as timm/resnet18"
        )


def classes_of(given: Given, image: Tensor, role: str) -> int:
    """C, the width of the logits of a caller's module for `image` (B, 3, H, W); 0 for a name.

    Raises:
        UserError: it does not take the images, or returns no logits.
    """
    if not isinstance(given, nn.Module):
        return 0
    owner = f"the {role} {name_of(given)}"
    output = returned(given, on_device_of(given, image[:2]), owner)
    logits = logits_of(output)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise UserError(
            f"{owner} returns {described(output)}; it must return logits (B, C), or (logits, features by name)"
        )
    return logits.shape[1]


def on_device_of(network: nn.Module, image: Tensor) -> Tensor:
    """`image` where the network's parameters are."""
    like = next(network.parameters(), image)
    return image.to(like.device)


def _student(given: Given, cfg: CN, facts: RunFacts) -> nn.Module:
    """The student as methods use it; a module is trained in place."""
    if isinstance(given, nn.Module):
        _check_own(cfg, "STUDENT")
        return _wrapped(given, facts.num_classes, facts.image_size, cfg.DISTILLER.STUDENT_FEATS)
    _check_named(given, "student")
    return starting_student(cfg, Named.of(cfg, "STUDENT", info_of(cfg), facts), facts.class_names)


def _teacher(given: Given, cfg: CN, facts: RunFacts, method: type[Distiller]) -> nn.Module:
    """The teacher as methods use it; with TEACHER_SIZE behind a resize."""
    if not isinstance(given, nn.Module):
        _check_named(given, "teacher")
        return frozen_teacher(cfg, info_of(cfg), facts, method)
    _check_own(cfg, "TEACHER")
    size = cfg.DISTILLER.TEACHER_SIZE or facts.image_size
    network = _wrapped(given, 0, size, cfg.DISTILLER.TEACHER_FEATS)
    if size == facts.image_size:
        return network
    seen = NativeInput(size, (0.0,) * 3, (1.0,) * 3)  # normalised as the caller does it
    return with_own_input(network, seen.mean, seen.std, seen, size)


def _wrapped(given: nn.Module, classes: int, image_size: int, feats: Sequence[str]) -> nn.Module:
    device = next((p.device for p in given.parameters()), torch.device("cpu"))
    return wrap(given, classes, image_size, feats).to(device)


def _check_named(given: Given, role: str) -> None:
    if given is None:
        raise UserError(f"no {role} is given; give it a network (torch.nn.Module) or a name, such as timm/resnet18")


def _check_own(cfg: CN, role: str) -> None:
    """Refuse settings that say which weights a network that is named has."""
    for key in (f"DISTILLER.{role}_CKPT", f"DISTILLER.{role}_PRETRAINED"):
        if setting(cfg, key) != setting(CFG, key):
            raise UserError(
                f"{key} {setting(cfg, key)} would be ignored: the {role.lower()} is a module, which has its weights; "
                "load them into it, or give its name"
            )


def method_of(cfg: CN, student: Given, teacher: Given, facts: RunFacts) -> Distiller:
    """The method of `cfg` with a caller's networks.

    Raises:
        UserError: a network does not fit; see `models.returned`, and what the method raises.
    """
    method: type[Distiller] = distiller_dict[cfg.DISTILLER.TYPE]
    if method.needs_teacher and teacher is student and teacher is not None and not isinstance(teacher, str):
        raise UserError("student and teacher are the same network, and a teacher is frozen; give it a copy.deepcopy")
    # The student first, so that one that is named starts from the same weights under every method.
    networks = {"student": _student(student, cfg, facts)}
    if method.needs_teacher:
        networks["teacher"] = _teacher(teacher, cfg, facts, method)
    reads = method.teacher_outputs or ()
    image, doubts = _random_image(facts.image_size), []
    for role, network in networks.items():
        classes = facts.num_classes if role == "student" or "logits" in reads else 0
        owner = f"the {role} {type(bare(network)).__name__}"
        found = tried(network, on_device_of(network, image), owner, role == "student", classes)
        if isinstance(found, Doubt):
            doubts.append(found)
    with explained(doubts):
        built: Distiller = method.from_run(networks["student"], networks.get("teacher"), cfg, facts)
    return built


def _random_image(size: int) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@contextmanager
def kept_generators(device: torch.device) -> Iterator[None]:
    """Afterwards the generators of Python, NumPy and torch, which are the caller's, are as before."""
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(state, device)


@contextmanager
def kept_hooks(*networks: Given) -> Iterator[None]:
    """Afterwards a caller's modules are without the hooks by which they gave their features to the training."""
    modules = [network for network in networks if isinstance(network, nn.Module)]
    before = [tap_numbers(module) for module in modules]
    try:
        yield
    finally:
        for module, numbers in zip(modules, before):
            remove_taps(module, numbers)


@contextmanager
def kept_teacher(teacher: Given) -> Iterator[None]:
    """Afterwards a caller's teacher is in the mode it was in, and its parameters require what they required."""
    if not isinstance(teacher, nn.Module):
        yield
        return
    trained, modes = [p for p in teacher.parameters() if p.requires_grad], {m: m.training for m in teacher.modules()}
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, mode in modes.items():
            module.training = mode
