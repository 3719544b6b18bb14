"""What every method must keep to; checked once, when its trainer is built. docs/methods.md describes it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn as nn

from ..console import one_line
from ..errors import UserError
from ..models.eval_mode import eval_mode
from ..models.parameters import Group, flat_parameters
from ._base import Distiller, logits_of


def check_distiller(distiller: Distiller) -> None:
    """Refuse a method that would train, score or save something else than it says.

    Raises:
        UserError: names the method, what is wrong, and how to declare it.
    """
    check_parameters(distiller)
    _check_frozen(distiller)
    _check_deployments(distiller)


def learnable_parameters(distiller: Distiller) -> list[nn.Parameter | Group]:
    """What the optimizer updates: `get_learnable_parameters()` without what the method names as untrained."""
    untrained = {id(p) for key, p in distiller.named_parameters() if _belongs(key, distiller.untrained)}
    learnable: list[nn.Parameter | Group] = []
    for entry in distiller.get_learnable_parameters():
        if isinstance(entry, dict):
            learnable.append({**entry, "params": [p for p in entry["params"] if id(p) not in untrained]})
        elif id(entry) not in untrained:
            learnable.append(entry)
    return learnable


def check_parameters(distiller: Distiller) -> None:
    """Every parameter that requires a gradient is learnable, or declared as untrained.

    Raises:
        UserError: naming those that are neither.
    """
    method = type(distiller).__name__
    learnable = _learnable_ids(distiller)
    parameters = dict(distiller.named_parameters())
    left_out = [key for key, p in parameters.items() if p.requires_grad and id(p) not in learnable]
    left_out = [key for key in left_out if not _belongs(key, distiller.untrained)]
    if left_out:
        raise UserError(
            f"{method}: {_few(left_out)} would not be trained; return them in get_learnable_parameters(), or name them "
            "in the class attribute `untrained`; a frozen network is added by add_frozen(NAME, network)"
        )
    unknown = [name for name in distiller.untrained if not any(_belongs(key, (name,)) for key in parameters)]
    if unknown:
        raise UserError(f"{method}.untrained names {_few(unknown)}, but it has no such parameters")


def _learnable_ids(distiller: Distiller) -> set[int]:
    return set(map(id, flat_parameters(distiller.get_learnable_parameters())))


def _belongs(key: str, names: Iterable[str]) -> bool:
    """Whether the parameter `key` is one of `names`, or lies in the submodule that one of them names."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _check_frozen(distiller: Distiller) -> None:
    """No frozen network has a parameter that would be trained."""
    learnable = _learnable_ids(distiller)
    for name in distiller.frozen:
        own = distiller.get_submodule(name).named_parameters(prefix=name)
        trained = [key for key, p in own if p.requires_grad or id(p) in learnable]
        if trained:
            raise UserError(
                f"{type(distiller).__name__}: {_few(trained)} would be trained, but {name} is frozen; give what is "
                "trained a module of its own"
            )


def _check_deployments(distiller: Distiller) -> None:
    name, method = type(distiller).__name__, type(distiller)
    if method.forward_test is not Distiller.forward_test and method.deployments is Distiller.deployments:
        raise UserError(
            f"{name} overrides forward_test, but not deployments: the network that is scored would not be the one that "
            "is saved, averaged and costed. Define deployments(), which returns the deployed networks by name, such as "
            '{"student": self.deployed}, instead of forward_test'
        )
    networks: Any = distiller.deployments()
    if not (isinstance(networks, Mapping) and networks and all(isinstance(n, nn.Module) for n in networks.values())):
        raise UserError(f"{name}.deployments() must return networks by name, it returns {one_line(networks, 100)}")
    unfit = [key for key in networks if not re.fullmatch(r"[\w.-]+", str(key)) or key == "ema"]
    if unfit:
        raise UserError(
            f"{name}.deployments(): {unfit[0]!r} cannot be part of a file's name, or is SOLVER.EMA's; take another one"
        )
    again = distiller.deployments()
    if any(again.get(key) is not network for key, network in networks.items()):
        raise UserError(f"{name}.deployments() must return the same networks at every call; build them in __init__")


def check_scores(distiller: Distiller, image_size: int) -> None:
    """Refuse a method whose first head is not its main deployment: one that scores another network than it saves.

    Args:
        image_size: height and width of the run's images.

    Raises:
        UserError: names both.
    """
    name, main = next(iter(distiller.deployments().items()))
    shape = (2, 3, image_size, image_size)
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(next(main.parameters()))
    with eval_mode(distiller):
        deployed = logits_of(distiller.deployments()[name](image))
        scored = {
            "forward_test": distiller.forward_test(image),
            "forward_heads": next(iter(distiller.forward_heads(image).values())),
        }
    for method, logits in scored.items():
        if logits.shape != deployed.shape or not torch.allclose(logits, deployed, rtol=1e-3, atol=1e-4, equal_nan=True):
            raise UserError(
                f"{type(distiller).__name__}.{method} scores other logits than its deployment {name!r} "
                f"({type(main).__name__}) gives; let deployments() return the network that is scored first"
            )


def gradient_gap(distiller: Distiller, without: Iterable[nn.Parameter]) -> str:
    """A sentence that names the parameters `without` a gradient after a step; empty if there are none.

    Those that the method declares as untrained are left out.
    """
    missing = set(map(id, without))
    names = [key for key, p in distiller.named_parameters() if id(p) in missing]
    names = [key for key in names if not _belongs(key, distiller.untrained)]
    return f"{type(distiller).__name__}: {len(names)} parameters get no gradient ({_few(names)})" if names else ""


def not_averaged(distiller: Distiller) -> list[str]:
    """Names of the parameters and buffers that training leaves alone, or changes on every process alike."""
    parts = (*distiller.frozen, *distiller.untrained)
    return [key for key, _ in (*distiller.named_parameters(), *distiller.named_buffers()) if _belongs(key, parts)]


def _few(names: list[str], count: int = 3) -> str:
    """The first few names, and how many there are."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} others" if len(names) > count else "")
