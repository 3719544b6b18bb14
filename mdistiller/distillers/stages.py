"""Stages before training: epochs in which other parameters learn by other losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..models.eval_mode import eval_mode
from ..models.parameters import Learnable, flat_parameters, parameter_groups


@dataclass(frozen=True)
class Stage:
    """Epochs before the SOLVER.EPOCHS ones, with an optimizer of their own.

    Attributes:
        name: in the log and in messages.
        epochs: how many; a stage of 0 is left out.
        learnable: what is trained, parameters or groups of them. All others require no gradients meanwhile, and a layer
            without a trained parameter evaluates.
        losses: (image, target, **kwargs) -> named scalar losses, with the arguments of `forward_train`; `epoch` counts
            from 1 in each stage.
        lr: its learning rate, which stays the same; 0: SOLVER.LR.
    """

    name: str
    epochs: int
    learnable: Learnable
    losses: Callable[..., dict[str, Tensor]]
    lr: float = 0.0

    def __post_init__(self) -> None:
        # Groups of lists: a caller's may be of generators, which can be read once.
        object.__setattr__(self, "learnable", tuple(parameter_groups(self.learnable)))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained, without the groups."""
        return flat_parameters(self.learnable)


def parameters_behind(
    network: nn.Module, image_size: int | tuple[int, int], maps: Callable[[Any], Iterable[Tensor]]
) -> list[nn.Parameter]:
    """The trainable parameters of a network that some of its features depend on, such as those of its trunk.

    Args:
        image_size: height and width of the images.
        maps: the features by name -> those that count.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    like = next(network.parameters())
    with eval_mode(network), torch.enable_grad():
        _, features = network(like.new_zeros(1, 3, *size))
    found = set(map(id, leaves_of(maps(features))))
    return [p for p in network.parameters() if id(p) in found]


def leaves_of(losses: Iterable[Tensor]) -> list[Tensor]:
    """The tensors that get a gradient from the losses' backward pass."""
    nodes: list[Any] = [loss.grad_fn for loss in losses if loss.grad_fn is not None]
    seen, leaves = set(nodes), []
    while nodes:
        node = nodes.pop()
        if node.name().endswith("AccumulateGrad"):
            leaves.append(node.variable)
        before = {one for one, _ in node.next_functions if one is not None} - seen
        seen |= before
        nodes += before
    return leaves


def train_layers(module: nn.Module, trained: set[int]) -> None:
    """Training mode for the layers of `module` all of whose parameters are trained, eval mode for all others.

    Args:
        trained: the parameters, by `id`.
    """
    for child in module.children():
        own = [id(p) in trained for p in child.parameters()]
        if own and all(own):
            child.train()
        else:
            child.training = False
            train_layers(child, trained)
