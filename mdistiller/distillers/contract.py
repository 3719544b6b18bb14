"""What every method must keep to; checked once, when its trainer is built. docs/methods.md describes it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..console import one_line
from ..errors import UserError
from ..models.eval_mode import eval_mode
from ..models.parameters import Group, flat_parameters
from ..models.returned import described, returned
from ._base import Distiller, logits_of
from .stages import leaves_of


def check_distiller(distiller: nn.Module) -> None:
    """Refuse what is no method, and a method that would train, score or save something else than it says.

    Raises:
        UserError: names the method, what is wrong, and how to declare it.
    """
    if not isinstance(distiller, Distiller):
        raise UserError(
            f"the trainer's distiller is a {type(distiller).__name__}; give it a method, a subclass of "
            "mdistiller.distillers.Distiller, such as KD(student, teacher, cfg)"
        )
    check_parameters(distiller)
    _check_frozen(distiller)
    _check_owned(distiller)
    _check_deployments(distiller)
    _check_stages(distiller)


def learnable_parameters(distiller: Distiller) -> list[nn.Parameter | Group]:
    """What the optimizer updates: `get_learnable_parameters()` without what the method names as untrained.

    In a stage before training, what that one trains.
    """
    untrained = {id(p) for key, p in distiller.named_parameters() if _belongs(key, distiller.untrained)}
    learnable: list[nn.Parameter | Group] = []
    for entry in _trained(distiller):
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


_OWNED = (
    "In __init__, make them attributes: a Module, an nn.Parameter, or entries of an nn.ModuleList; and return them in "
    "get_learnable_parameters()"
)


def _check_owned(distiller: Distiller) -> None:
    """What is learnable belongs to the method's modules, and some of it can be trained."""
    method, own = type(distiller).__name__, {id(p) for p in distiller.parameters()}
    learnable = flat_parameters(learnable_parameters(distiller))
    hidden = _hidden(distiller)
    # A tensor that is a plain attribute, `self.scale = torch.ones(1, requires_grad=True)`, is no parameter for torch.
    plain = [p for p, name in hidden if not isinstance(p, nn.Parameter) and p.requires_grad and p.is_leaf]
    strange = [p for p in (*learnable, *plain) if id(p) not in own]
    if strange:
        names = _few(_named(strange, hidden))
        raise UserError(
            f"{method} is to train {names}, which no module of the method has, so that they would be neither saved nor "
            f"moved to the device. {_OWNED}"
        )
    if not any(p.requires_grad for p in learnable):
        raise UserError(
            f"{method}: none of the {len(learnable)} learnable parameters requires a gradient, so nothing would be "
            "trained; leave requires_grad on for what is to be trained"
        )


def check_losses(distiller: Distiller, losses: Iterable[Tensor]) -> None:
    """Refuse a first step's losses that depend on a parameter of no module of the method: one in a plain list, say.

    Raises:
        UserError: naming it; or no loss depends on any parameter.
    """
    method, leaves = type(distiller).__name__, leaves_of(losses)
    if not leaves:
        raise UserError(
            f"{method}: no loss depends on a parameter that requires a gradient, so that nothing would be trained; "
            "compute them from the student's outputs, without detach() or no_grad()"
        )
    own = {id(p) for p in distiller.parameters()}
    forgotten = [p for p in leaves if isinstance(p, nn.Parameter) and id(p) not in own]
    if forgotten:
        names = _few(_named(forgotten, _hidden(distiller)))
        raise UserError(
            f"{method}: a loss depends on {names}, which no module of the method has, so that they would be neither "
            f"trained nor saved. {_OWNED}"
        )


def _hidden(distiller: Distiller) -> list[tuple[Tensor, str]]:
    """The tensors that torch does not know of, with their names: in plain attributes of what is not frozen."""
    modules = [(name, m) for name, m in distiller.named_modules() if not _belongs(name, distiller.frozen)]
    known = vars(nn.Module()).keys()
    return [
        found
        for prefix, module in modules
        for key, value in vars(module).items()
        if key not in known
        for found in _tensors(value, f"{prefix}.{key}" if prefix else key)
    ]


def _tensors(value: Any, name: str, depth: int = 3) -> Iterator[tuple[Tensor, str]]:
    """The tensors in `value`: itself, a module's parameters, or what lists and dictionaries hold."""
    if isinstance(value, Tensor):
        yield value, name
    elif isinstance(value, nn.Module):
        yield from ((p, key) for key, p in value.named_parameters(prefix=name))
    elif depth and isinstance(value, (list, tuple, dict)):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for key, entry in entries:
            yield from _tensors(entry, f"{name}[{key!r}]", depth - 1)


def _named(tensors: Iterable[Tensor], hidden: Iterable[tuple[Tensor, str]]) -> list[str]:
    """What the method calls the `tensors`, or their shapes."""
    names = {id(tensor): name for tensor, name in hidden}
    return list(dict.fromkeys(names.get(id(tensor), f"a parameter {tuple(tensor.shape)}") for tensor in tensors))


def _trained(distiller: Distiller) -> Iterable[nn.Parameter | Group]:
    """What the method says is trained now."""
    return distiller.get_learnable_parameters() if distiller.stage_on is None else distiller.stage_on.learnable


def _learnable_ids(distiller: Distiller) -> set[int]:
    return set(map(id, flat_parameters(_trained(distiller))))


def _belongs(key: str, names: Iterable[str]) -> bool:
    """Whether the parameter `key` is one of `names`, or lies in the submodule that one of them names."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _check_frozen(distiller: Distiller) -> None:
    """No frozen network has a parameter that would be trained."""
    if distiller.student is distiller.teacher:
        raise UserError(
            f"{type(distiller).__name__}: student and teacher are the same {type(distiller.student).__name__}, and a "
            "teacher is frozen; give it two networks, such as copy.deepcopy(student) for the teacher"
        )
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
    name = type(distiller).__name__
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


def only_scores(distiller: Distiller) -> bool:
    """Whether a method says how it is scored, and not which network that is, as the original's methods do."""
    method = type(distiller)
    return method.forward_test is not Distiller.forward_test and method.deployments is Distiller.deployments


def _check_stages(distiller: Distiller) -> None:
    """Each stage before training has a name of its own, and trains parameters of the method's modules."""
    stages = distiller.stages()
    method, names = type(distiller).__name__, [stage.name for stage in stages]
    if len(set(names)) < len(names) or not all(names):
        raise UserError(f"{method}.stages() names its stages {', '.join(map(repr, names))}; give each its own name")
    own, frozen = set(map(id, distiller.parameters())), dict[int, str]()
    for name in distiller.frozen:
        frozen |= {id(p): key for key, p in distiller.get_submodule(name).named_parameters(prefix=name)}
    for stage in stages:
        parameters = stage.parameters
        if not parameters:
            raise UserError(f"{method}: the stage {stage.name!r} has no parameters to train")
        strange = [p for p in parameters if id(p) not in own]
        if strange:
            found = _few(_named(strange, _hidden(distiller)))
            raise UserError(
                f"{method}: the stage {stage.name!r} is to train {found}, which no module of it has. In __init__, make "
                "them attributes: a Module, or an nn.Parameter"
            )
        taught = [frozen[id(p)] for p in parameters if id(p) in frozen]
        if taught:
            raise UserError(f"{method}: the stage {stage.name!r} would train {_few(taught)}, which is frozen")


def check_scores(distiller: Distiller, image_size: int) -> None:
    """`check_scored` by an image of noise.

    Args:
        image_size: height and width of the run's images.

    Raises:
        UserError: see `check_scored`.
    """
    shape = (2, 3, image_size, image_size)
    parameter = next(distiller.main_network().parameters())
    check_scored(distiller, torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(parameter))


def check_scored(distiller: Distiller, image: Tensor) -> None:
    """Refuse a method whose first head is not its main deployment: one that scores another network than it saves.

    Args:
        image: (B, 3, H, W).

    Raises:
        UserError: names both.
    """
    name, main = next(iter(distiller.deployments().items()))
    output = returned(distiller.deployments()[name], image, f"the deployment {name} {type(main).__name__}")
    with eval_mode(distiller):
        deployed = logits_of(output)
        if not isinstance(deployed, Tensor) or deployed.ndim != 2:
            raise UserError(
                f"{type(distiller).__name__}'s deployment {name!r} ({type(main).__name__}) returns {described(output)}"
                "; it must return logits (B, C), or (logits, features by name)"
            )
        scored = {
            "forward_test": distiller.forward_test(image),
            "forward_heads": next(iter(distiller.forward_heads(image).values())),
        }
    for method, logits in scored.items():
        if logits.shape != deployed.shape or not torch.allclose(logits, deployed, rtol=1e-3, atol=1e-4, equal_nan=True):
            if only_scores(distiller):
                raise UserError(
                    f"{type(distiller).__name__} overrides forward_test, but not deployments: the network that is "
                    "scored would not be the one that is saved, averaged and costed. Define deployments(), which "
                    'returns the deployed networks by name, such as {"student": self.deployed}, instead of forward_test'
                )
            raise UserError(
                f"{type(distiller).__name__}.{method} scores other logits than its deployment {name!r} "
                f"({type(main).__name__}) gives; let deployments() return the network that is scored first"
            )


def gradient_gap(distiller: Distiller, without: Iterable[nn.Parameter]) -> str:
    """A sentence that names the parameters `without` a gradient after a step; empty if there are none.

    Those that the method declares as untrained are left out, and so are those that require none.
    """
    missing = {id(p) for p in without if p.requires_grad}
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
