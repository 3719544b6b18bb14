"""The grouped student of DCGD: a plain network, and on its trunk one more last stage and classifier for each group.

    image -> trunk -> the plain network's last stage -> its classifier      -> single  (B, C)
                   \\-> branch g's last stage         -> head g (|group g|)  -> grouped (B, C), put in class order
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.func import functional_call

from ..errors import UserError
from ..grouping import check_groups, published_groups
from ..registry import unknown_name
from ._staged import Maps, StagedNet
from .cifar.resnet import NARROW, ResNet

BRANCH_MODES = ("auto", "loop", "together")


class GroupedStudent(nn.Module):
    """A plain network with G branches on its trunk, each with a classifier over the classes of one group.

    State: `base.*` (the plain network, which runs by itself too), `branches.<g>.<its last stage's names>`,
    `heads.<g>.*`. The groups are not part of the state.

    Args:
        base: a network whose last stage can be split off.
        groups: the classes of each group; a head's outputs follow their order.
        branch_mode: compute the branches one after the other ("loop") or as one wide network ("together"); "auto" is
            together on a GPU, where it starts half as many kernels, and a loop on the CPU, where it saves nothing.

    Raises:
        UserError: `base` has no last stage to split off, the groups are not a partition of its classes, or there
            is no such mode.
    """

    head_names = ("grouped", "single", "mean")

    def __init__(self, base: nn.Module, groups: Sequence[Sequence[int]], branch_mode: str = "auto") -> None:
        super().__init__()
        if not isinstance(base, StagedNet):
            raise UserError(
                f"{type(base).__name__} has no last stage to split off, so DCGD cannot group it; "
                "use a ResNet, WRN or VGG as the student"
            )
        classifier = base.get_classifier()
        check_groups([list(group) for group in groups], classifier.out_features)
        self.groups = [list(group) for group in groups]
        self.set_branch_mode(branch_mode)
        self.base = base
        self.branches = nn.ModuleList([base.new_last_stage() for _ in groups])
        self.heads = nn.ModuleList([nn.Linear(classifier.in_features, len(group)) for group in groups])
        self.heads.apply(base.init_weights)
        # Class c is in column `column[c]` of the heads' concatenated outputs.
        self.column: Tensor
        self.register_buffer("column", torch.tensor([c for g in groups for c in g]).argsort(), persistent=False)
        # In a tuple, so that the wide branch, which has no weights of its own, is not registered as a submodule.
        self._wide = (_widen(_Pooled(self.branches[0], base.forward_last), len(self.groups)),)

    def set_branch_mode(self, mode: str) -> None:
        """Choose how the branches are computed; see the class.

        Raises:
            UnknownNameError: no such mode.
        """
        if mode not in BRANCH_MODES:
            raise unknown_name("branch mode", mode, BRANCH_MODES)
        self.branch_mode = mode

    def forward(self, image: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """(B, 3, H, W) -> grouped logits (B, C) and the plain network's features, with its logits "logits_single"."""
        logits_single, features = self.base(image)
        return self.forward_grouped(features), {**features, "logits_single": logits_single}

    def forward_grouped(self, features: dict[str, Any]) -> Tensor:
        """The grouped logits (B, C) in class order, from the features that the plain network's forward returned."""
        trunk = features["feats"][-2]  # the last stage adds one map to those of the trunk
        pooled = self._pooled_together(trunk) if self._together(trunk) else self._pooled_in_a_loop(trunk)
        logits = [head(x) for head, x in zip(self.heads, pooled)]
        return torch.cat(logits, dim=1).index_select(1, self.column)

    def forward_heads(self, image: Tensor) -> dict[str, Tensor]:
        """The logits (B, C) of both heads, and their mean."""
        grouped, features = self(image)
        single = features["logits_single"]
        return {"grouped": grouped, "single": single, "mean": (grouped + single) / 2}

    def _together(self, x: Tensor) -> bool:
        return self.branch_mode == "together" or (self.branch_mode == "auto" and x.is_cuda)

    def _pooled_in_a_loop(self, x: Tensor) -> Sequence[Tensor]:
        """Each branch's pooled feature (B, D)."""
        return [self.base.forward_last(branch, x)[2] for branch in self.branches]

    def _pooled_together(self, x: Tensor) -> Sequence[Tensor]:
        """The same from one network G times as wide, whose weights are the branches' weights concatenated."""
        (wide,) = self._wide
        wide.train(self.training)
        weights = _side_by_side([dict(branch.named_parameters()) for branch in self.branches])
        statistics = _side_by_side([dict(branch.named_buffers()) for branch in self.branches])
        state = {f"branch.{name}": tensor for name, tensor in (weights | statistics).items()}
        pooled = functional_call(wide, state, (x.repeat(1, len(self.branches), 1, 1),))
        if self.training:  # BatchNorm has updated the copies
            _write_back(statistics, [dict(branch.named_buffers()) for branch in self.branches])
        return pooled.chunk(len(self.branches), dim=1)

    # What distillers call on every network is passed on to the plain network.
    def get_feat_modules(self) -> nn.ModuleList:
        """The plain network's."""
        return self.base.get_feat_modules()

    def get_bn_before_relu(self) -> list[nn.Module]:
        """The plain network's."""
        return self.base.get_bn_before_relu()

    def get_stage_channels(self) -> list[int]:
        """The plain network's."""
        return self.base.get_stage_channels()


class _Pooled(nn.Module):
    """A branch as a module with a forward: trunk's map -> pooled feature."""

    def __init__(self, branch: nn.Module, forward_last: Callable[..., Any]) -> None:
        super().__init__()
        self.branch = branch
        self.forward_last = forward_last

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_last(self.branch, x)[2]


def _widen(module: nn.Module, count: int) -> nn.Module:
    """A copy of `module`, without weights, that runs `count` such modules at once, side by side in the channels.

    Only convolutions need a change: the other layers of a last stage work on each channel separately.
    """
    wide = copy.deepcopy(module).to("meta")
    for m in wide.modules():
        if isinstance(m, nn.Conv2d):
            m.groups *= count
    return wide


def _side_by_side(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of each name, concatenated; of a scalar (BatchNorm's count of batches), a copy of the first."""
    first = states[0]
    return {name: torch.cat([s[name] for s in states]) if first[name].ndim else first[name].clone() for name in first}


def _write_back(merged: dict[str, Tensor], states: Sequence[dict[str, Tensor]]) -> None:
    """Copy what `_side_by_side` concatenated back to where it came from."""
    for name, tensor in merged.items():
        chunks = tensor.chunk(len(states)) if tensor.ndim else [tensor] * len(states)
        torch._foreach_copy_([s[name] for s in states], list(chunks))  # one kernel for all branches


class LinearStemResNet(ResNet):
    """The plain network of the published students: a CIFAR ResNet without the ReLU after its stem.

    The published code has no ReLU there, and the pinned values come from it. Names and shapes are those of the ResNet
    with the ReLU, but the weights of one do not work in the other.
    """

    def forward_trunk(self, image: Tensor) -> tuple[Maps, Maps]:
        f0 = self.bn1(self.conv1(image))
        f1, f1_pre = self.layer1(f0)
        f2, f2_pre = self.layer2(f1)
        return [f0, f1, f2], [f0, f1_pre, f2_pre]


def _published(depth: int, teacher: str, num_classes: int = 100) -> GroupedStudent:
    return GroupedStudent(LinearStemResNet(depth, NARROW, num_classes), published_groups(teacher))


# The published students: res56_M_r20 is resnet20 (without the stem's ReLU) grouped by resnet56's mistakes on the test
# images. None has a published checkpoint.
published_students: dict[str, tuple[Callable[..., GroupedStudent], None]] = {
    f"{short}_M_r{depth}": (partial(_published, depth, teacher), None)
    for short, teacher in (("res56", "res56"), ("wrn", "wrn_40_2"))
    for depth in (20, 32, 44)
}
