"""The grouped student of DCGD: a plain network, and on its trunk one more last stage and classifier for each group.

    image -> trunk -> the plain network's last stage -> its classifier      -> single  (B, C)
                   \\-> branch g's last stage         -> head g (|group g|)  -> grouped (B, C), put in class order
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..console import network_name
from ..errors import UserError
from ..grouping import check_groups, published_groups
from ..registry import unknown_name
from ._network import Network
from ._staged import Maps, StagedNet
from .cifar.resnet import NARROW, ResNet
from .copies import has_hooks

BRANCH_MODES = ("auto", "loop", "together")


class GroupedStudent(Network):
    """A plain network with G branches on its trunk, each with a classifier over the classes of one group.

    State: `base.*` (the plain network, which runs by itself too), `branches.<g>.<its last stage's names>`,
    `heads.<g>.*`. The groups are not part of the state.

    Args:
        base: a network whose last stage can be split off.
        groups: the classes of each group; a head's outputs follow their order.
        branch_mode: compute the branches one after the other ("loop") or as one wide network ("together"); "auto" is
            together on a GPU, where it starts half as many kernels, and a loop on the CPU, where it saves nothing.
            Branches that cannot be one network are always a loop: if they differ in a layer, a setting or a training
            mode, if they have hooks, or if a layer of theirs is neither a convolution nor works on each channel.

    Raises:
        UserError: `base` has no last stage to split off, the groups are not a partition of its classes, or there
            is no such mode.
    """

    head_names = ("grouped", "single", "mean")

    def __init__(self, base: nn.Module, groups: Sequence[Sequence[int]], branch_mode: str = "auto") -> None:
        super().__init__()
        if not isinstance(base, StagedNet):
            raise UserError(
                f"{network_name(base)} has no last stage to split off, so DCGD cannot group it; use a ResNet, WRN or "
                "VGG of this library as the student, such as resnet20; any network can be the teacher"
            )
        classifier = base.get_classifier()
        check_groups([list(group) for group in groups], classifier.out_features)
        self.groups = [list(group) for group in groups]
        self.set_branch_mode(branch_mode)
        self.base = base
        self.branches = nn.ModuleList([base.new_last_stage() for _ in groups])
        self.heads = nn.ModuleList([nn.Linear(classifier.in_features, len(group)) for group in groups])
        self.heads.apply(_init_head)
        # Class c is in column `column[c]` of the heads' concatenated outputs.
        self.column: Tensor
        self.register_buffer("column", torch.tensor([c for g in groups for c in g]).argsort(), persistent=False)

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
        chosen = self.branch_mode == "together" or (self.branch_mode == "auto" and x.is_cuda)
        return chosen and _can_widen(self.branches)

    def _pooled_in_a_loop(self, x: Tensor) -> Sequence[Tensor]:
        """Each branch's pooled feature (B, D)."""
        return [self.base.forward_last(branch, x)[2] for branch in self.branches]

    def _pooled_together(self, x: Tensor) -> Sequence[Tensor]:
        """The same from one network G times as wide, whose weights are the branches' weights concatenated."""
        wide = _side_by_side(list(self.branches))
        pooled = self.base.forward_last(wide, x.repeat(1, len(self.branches), 1, 1))[2]
        _write_back(wide, self.branches)
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

    def get_classifier(self) -> nn.Linear:
        """The plain network's, whose last map and `logits_single` the features hold."""
        return self.base.get_classifier()


def _init_head(module: nn.Module) -> None:
    """Draw a head's weights from N(0, 0.001^2), as the published code does; its bias starts at 0. For `apply`."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.001)
        nn.init.zeros_(module.bias)


# Layers that compute each channel by itself, so that G of them side by side are the same layer, G times as wide.
_CHANNELWISE = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.ReLU, nn.Identity, nn.MaxPool2d, nn.AvgPool2d, nn.Sequential)


def _can_widen(branches: nn.ModuleList) -> bool:
    """Whether one wide network computes what the branches compute; asked at every step, as layers may be replaced.

    A layer that contains others must mix channels by these alone, as the blocks of all families do.
    """
    named = [list(branch.named_modules(remove_duplicate=False)) for branch in branches]
    if has_hooks(branches) or not all(_can_be_wide(layer) for _, layer in named[0]):
        return False
    outlines = [_outline(layers) for layers in named]
    layers = [layer for branch in named for _, layer in branch]
    return outlines.count(outlines[0]) == len(outlines) and len(set(layers)) == len(layers)  # no layer has two places


def _can_be_wide(layer: nn.Module) -> bool:
    if not {"forward", "_compiled_call_impl"}.isdisjoint(vars(layer)):
        return False  # it runs something else than the forward of its class
    if next(layer.children(), None) is not None:
        return not layer._parameters and not layer._buffers
    if getattr(layer, "momentum", 0) is None:
        return False  # BatchNorm averages by its own count of batches, which may differ between branches
    return type(layer) is nn.Conv2d or isinstance(layer, _CHANNELWISE)


def _outline(layers: list[tuple[str, nn.Module]]) -> list[Any]:
    """What must be equal for layers to be side by side: names, types, settings, modes and the tensors' shapes."""
    return [
        (
            name,
            type(layer),
            {key: value for key, value in vars(layer).items() if key[0] != "_" and _is_setting(value)},
            [None if t is None else t.shape for t in (*layer._parameters.values(), *layer._buffers.values())],
        )
        for name, layer in layers
    ]


def _is_setting(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_setting, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _side_by_side(layers: Sequence[nn.Module]) -> nn.Module:
    """One module that runs `layers` at once, side by side in the channels; `_can_widen` says whether that is possible.

    It is made anew for every step, in a fraction of a millisecond, so that its layers are those that the branches have
    then: SyncBatchNorm takes BatchNorm's place after the student is built.
    """
    first = layers[0]
    wide: Any = type(first).__new__(type(first))
    vars(wide).update(vars(first))  # a shallow copy, with tensors and inner layers of its own:
    wide._parameters = _concatenated([layer._parameters for layer in layers])
    wide._buffers = _concatenated([layer._buffers for layer in layers])
    wide._modules = {
        name: None if child is None else _side_by_side([getattr(layer, name) for layer in layers])
        for name, child in first._modules.items()
    }
    if isinstance(first, nn.Conv2d):
        wide.groups = first.groups * len(layers)
    return wide


def _concatenated(states: Sequence[dict[str, Any]]) -> dict[str, Tensor | None]:
    """The tensors of each name, concatenated; of a scalar (BatchNorm's count of batches), a copy of the first."""
    merged: dict[str, Tensor | None] = {}
    for name, first in states[0].items():
        if first is not None:
            first = torch.cat([state[name] for state in states]) if first.ndim else first.clone()
        merged[name] = first
    return merged


@torch.no_grad()
def _write_back(wide: nn.Module, branches: nn.ModuleList) -> None:
    """Copy the BatchNorm statistics of `wide`, which its forward has updated, back to where they came from."""
    for merged, *layers in zip(wide.modules(), *[branch.modules() for branch in branches]):
        for name, tensor in merged.named_buffers(recurse=False) if merged.training else ():
            own = [getattr(layer, name) for layer in layers]
            if tensor.ndim:
                torch._foreach_copy_(own, list(tensor.chunk(len(own))))  # one kernel for all branches
            else:
                torch._foreach_add_(own, 1)  # the branches may have seen different numbers of batches


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
