"""The optimizers by their SOLVER.TYPE."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer
from yacs.config import CfgNode as CN

from ..errors import UserError
from ..models.parameters import Group
from ..registry import Registry
from .deepkd import DeepKDOptimizer
from .dot import DistillationOrientedTrainer

# SOLVER.TYPE -> function of (parameter groups, cfg.SOLVER), for one gradient, for DOT's two and for DeepKD's
# three. The settings of SOLVER are those of a group that has none of its own.
optimizer_dict = Registry("SOLVER.TYPE")
dot_optimizer_dict = Registry("SOLVER.TYPE for the DOT trainers")
deepkd_optimizer_dict = Registry("SOLVER.TYPE for the DeepKD trainer")


@optimizer_dict.register("SGD")
def sgd(groups: list[Group], solver: CN) -> Optimizer:
    """SGD with LR, MOMENTUM and WEIGHT_DECAY."""
    # Where fp16's scale was too large, torch's fused SGD writes into the momentum what it must skip (2.11), and leaves
    # it without a value in a first step (2.14).
    fused = _fused(groups) and solver.AMP != "fp16"
    return torch.optim.SGD(
        groups, lr=solver.LR, momentum=solver.MOMENTUM, weight_decay=solver.WEIGHT_DECAY, fused=fused
    )


@optimizer_dict.register("AdamW")
def adamw(groups: list[Group], solver: CN) -> Optimizer:
    """AdamW with LR, BETAS and WEIGHT_DECAY. arXiv 1711.05101."""
    betas = tuple(solver.BETAS)
    return torch.optim.AdamW(groups, lr=solver.LR, betas=betas, weight_decay=solver.WEIGHT_DECAY, fused=_fused(groups))


def _fused(groups: list[Group]) -> bool:
    """Whether to run the whole step in one kernel: on a GPU. On the CPU this is not faster, and rounds differently."""
    return bool(groups) and all(p.is_cuda for group in groups for p in group["params"])


@dot_optimizer_dict.register("SGD")
def dot_sgd(groups: list[Group], solver: CN) -> DistillationOrientedTrainer:
    """DOT with momentum MOMENTUM - DELTA for the task and MOMENTUM + DELTA for the distillation."""
    momenta = {"momentum": solver.MOMENTUM - solver.DOT.DELTA, "momentum_kd": solver.MOMENTUM + solver.DOT.DELTA}
    return DistillationOrientedTrainer(groups, lr=solver.LR, weight_decay=solver.WEIGHT_DECAY, **momenta)


@deepkd_optimizer_dict.register("SGD")
def deepkd_sgd(groups: list[Group], solver: CN) -> DeepKDOptimizer:
    """DeepKD with MOMENTUM plus DELTA_TOG for the task, DELTA_TCG for the target, DELTA_NCG for the other classes."""
    own = solver.DEEPKD
    names = {"momentum": own.DELTA_TOG, "momentum_target": own.DELTA_TCG, "momentum_others": own.DELTA_NCG}
    momenta = {name: solver.MOMENTUM + delta for name, delta in names.items()}
    return DeepKDOptimizer(groups, lr=solver.LR, weight_decay=solver.WEIGHT_DECAY, released=own.RELEASED, **momenta)


def load_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Restore what the optimizer remembers of each parameter, such as momentum, on its device and in its memory layout.

    All settings stay those that the optimizer was made with: weight decay, momentum, fused kernels, a group's own
    values. Only the learning rate is the state's, until the schedule sets it at the next step. What else an optimizer
    keeps in its groups, beside the settings, is not restored.

    Args:
        state: `Optimizer.state_dict()`, also of a run with other settings, on another device.

    Raises:
        UserError: the state is that of another kind of optimizer.
        ValueError, KeyError: the state belongs to other parameters.
    """
    saved = state["param_groups"]
    _check_kind(optimizer, saved)
    groups = [
        {**own, "lr": group["lr"], "params": group["params"]}
        for own, group in zip(optimizer.state_dict()["param_groups"], saved)
    ]
    # torch itself refuses another number of groups or of parameters.
    optimizer.load_state_dict({**state, "param_groups": groups + saved[len(groups) :]})
    for p, remembered in optimizer.state.items():
        for key, value in remembered.items():
            if isinstance(value, torch.Tensor) and value.shape == p.shape and value.stride() != p.stride():
                remembered[key] = torch.empty_like(p, dtype=value.dtype).copy_(value)


# Settings that optimizers of every kind have.
_COMMON = {"params", "lr", "weight_decay", "maximize", "foreach", "capturable", "differentiable", "fused"}


def _check_kind(optimizer: Optimizer, saved: list[dict[str, Any]]) -> None:
    """The groups of a state have at least one of the settings that only such an optimizer has.

    torch itself loads SGD's momentum into AdamW, and fails at the next step. A state of the same kind may lack settings
    that a newer torch has.

    Raises:
        UserError: they have none of them.
    """
    own = optimizer.defaults.keys() - _COMMON
    if own and saved and not any(own & group.keys() for group in saved):
        kind = type(optimizer).__name__
        raise UserError(
            f"it was saved with an optimizer of another kind than {kind} (without {', '.join(sorted(own))}); set "
            "SOLVER.TYPE, or the trainer's own init_optimizer, to that kind"
        )
