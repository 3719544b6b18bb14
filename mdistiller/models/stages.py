"""Which layers of a network give its feature maps, found in the calls of one forward.

The maps are the last output of each height and width before the classifier, from the largest on. A network of one size,
such as a vision transformer, has the outputs of four evenly spaced blocks. Where a network tells its intermediate maps
itself (`forward_intermediates`, as timm's do), these are chosen from.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules import activation, batchnorm

from .layouts import NCHW, NHWC, Grid, Layout, layouts_of
from .probing import Call, same_memory
from .taps import Place

_NO_ACTIVATIONS = (nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin, nn.GLU)
_ACTIVATION_MODULES = (activation.__name__, "timm.layers.activations", "timm.layers.activations_me")
_POOLING = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_WEIGHTED = (nn.Conv2d, nn.Linear)
_RELUS = (nn.ReLU, nn.ReLU6)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_BLOCKS = 4


@dataclass(frozen=True)
class Reading:
    """One tensor of a forward: what a place hands over in a call of its layer, and the order of its numbers."""

    place: Place
    number: int
    layout: Layout = NCHW


@dataclass(frozen=True)
class Stage:
    """Attributes:
    feat: the map.
    preact: the input of the activation whose output the map is; `feat` where no activation ends the stage.
    batchnorm: path of the BatchNorm directly before that activation, a ReLU; None where there is none.
    weighted: number of calls of convolutions and linear layers that the map follows.
    size: height and width of the map.
    """

    feat: Reading
    preact: Reading
    batchnorm: str | None
    weighted: int
    size: Grid


@dataclass(frozen=True)
class Head:
    """The classifier.

    Attributes:
        inputs: one for each of its layers (a distilled transformer has two), with the dimensions over which it is
            averaged to (B, D).
        begin: when it begins.
        width: D.
    """

    inputs: tuple[tuple[Reading, tuple[int, ...]], ...]
    begin: int
    width: int


def find_head(calls: Sequence[Call], logits: Tensor) -> Head | None:
    """The linear layer, or 1x1 convolution, that gives the logits; None where no such layer is found.

    It is the last one whose output are the logits; else all those of which the logits are the mean; else the last one
    with an output of that width, as where a pooling follows it.
    """
    wide = [call for call in calls if _width_out(call.layer) == logits.shape[1] and call.output is not None]
    exact = [call for call in wide if torch.equal(_flat(call.output), logits)]  # type: ignore[arg-type]
    vectors = [call for call in wide if call.output is not None and call.output.shape == logits.shape]
    chosen = exact[-1:]
    if not chosen and len(vectors) > 1:
        mean = torch.stack([call.output for call in vectors]).mean(0)  # type: ignore[misc]
        chosen = vectors if torch.allclose(mean, logits, atol=1e-5) else []
    chosen = chosen or wide[-1:]
    inputs = [call for call in chosen if call.input is not None]
    widths = [_width_in(call.layer) for call in inputs]
    if not inputs or len(set(widths)) > 1:
        inputs, widths = inputs[-1:], widths[-1:]
    if not inputs:
        return None
    readings = tuple((Reading((call.path, True), call.number), _spread(call)) for call in inputs)
    return Head(readings, min(call.begin for call in inputs), widths[0])


def last_map_of(calls: Sequence[Call], head: Head, stages: Sequence[Stage]) -> Reading | None:
    """The map (B, D, H, W) whose mean over its positions is the classifier's input; None where no layer has one.

    The largest, as a pooled map of 1x1 is its own mean; among equals that of the last stage, else the earliest. None
    too where only pooled maps have that mean, as where a normalisation follows the pooling.
    """
    classifier = {(call.path, call.number): call for call in calls}
    (reading, dims), *others = head.inputs
    taken = classifier[reading.place[0], reading.number].input
    if others or taken is None:
        return None
    pooled = taken.mean(dims) if dims else taken
    grids = Maps(calls, head.begin).grids
    found = []
    for call in calls:
        for x, is_input, moment in ((call.input, True, call.begin), (call.output, False, call.end)):
            if x is not None and moment <= head.begin and x.is_floating_point():
                fits = [layout for layout in layouts_of(x, grids) if _pools_to(layout(x), pooled)]
                found += [(Reading((call.path, is_input), call.number, layout), layout.size(x)) for layout in fits]
    largest = max((size for _, size in found), default=(0, 0))
    maps = [own for own, size in found if size == largest]
    for stage in stages[-1:]:
        if stage.feat in maps:
            return stage.feat
        if largest == (1, 1) != stage.size:
            return None
    return maps[0] if maps else None


def _pools_to(x: Tensor, pooled: Tensor) -> bool:
    """Whether the mean of a map (B, C, H, W) over its positions is `pooled` (B, D), up to rounding."""
    mean = x.mean((2, 3))
    return mean.shape == pooled.shape and torch.allclose(mean, pooled, rtol=1e-3, atol=1e-4 * float(pooled.abs().max()))


def _spread(call: Call) -> tuple[int, ...]:
    """The dimensions of a layer's input beside those of images and features."""
    ndim = call.input.ndim if call.input is not None else 2
    return tuple(range(1, ndim - 1)) if isinstance(call.layer, nn.Linear) else tuple(range(2, ndim))


def _width_out(layer: nn.Module) -> int:
    if not isinstance(layer, _WEIGHTED):
        return 0
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _width_in(layer: nn.Module) -> int:
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)  # type: ignore[arg-type]


def _flat(x: Tensor) -> Tensor:
    return x.flatten(1)


class Maps:
    """The outputs of a network's layers that may be feature maps, in the order in which they were computed.

    Args:
        calls: of one forward.
        before: when the classifier begins; later outputs are no feature maps. None: the network's end.

    Attributes:
        grids: the sizes of the maps that are no tokens.
    """

    def __init__(self, calls: Sequence[Call], before: int | None) -> None:
        self.calls, self.grids = calls, dict[Grid, None]()
        found: list[tuple[Call, Layout]] = []
        for call in calls:
            late = before is not None and call.end > before
            if call.path and not late and call.output is not None and call.output.is_floating_point():
                layouts = self._layouts(call)
                found += [(call, layouts[0])] if layouts else []
        self.found = [(call, layout) for call, layout in found if not isinstance(call.layer, _POOLING)]
        self._settle()

    def _layouts(self, call: Call) -> list[Layout]:
        output = call.output
        assert output is not None
        layouts = layouts_of(output, self.grids)
        if layouts and output.ndim == 4:
            self.grids.setdefault(layouts[0].size(output))
        return layouts if not _is_attention(output) else []

    def _settle(self) -> None:
        """Give a map that is as wide as high as deep the layout of most others."""
        sure = Counter(layout for call, layout in self.found if len(set(_shape(call)[1:])) == 2)
        if sure[NHWC] > sure[NCHW]:
            self.found = [
                (call, NHWC if layout == NCHW and len(set(_shape(call)[1:])) == 1 else layout)
                for call, layout in self.found
            ]

    def chosen(self) -> list[tuple[Call, Layout]]:
        """The maps; see the module's docstring."""
        inner = within_blocks(self.calls)
        self.found = [(call, layout) for call, layout in self.found if call.path not in inner]
        sizes = [layout.size(_output(call)) for call, layout in self.found]
        if any(size != (1, 1) for size in sizes):  # pooled, not a map
            self.found = [own for own, size in zip(self.found, sizes) if size != (1, 1)]
        last: dict[Grid, tuple[Call, Layout]] = {}
        for call, layout in self.found:
            last[layout.size(_output(call))] = (call, layout)
        kept: list[tuple[Call, Layout]] = []
        for size, (call, layout) in sorted(last.items(), key=lambda item: -item[1][0].end):
            if not kept or size > kept[-1][1].size(_output(kept[-1][0])):
                kept.append((call, layout))
        if len(kept) == 1:
            return self._blocks() or [outermost(*kept[0], self.calls)]
        return [outermost(call, layout, self.calls) for call, layout in reversed(kept)]

    def _blocks(self) -> list[tuple[Call, Layout]]:
        """Four evenly spaced blocks: of the layers with layers in them that stand side by side."""
        families = defaultdict(list)
        for call, layout in self.found:
            if any(True for _ in call.layer.children()) and not call.passes_on:
                families[call.path.rpartition(".")[0]].append((call, layout))
        blocks = max(families.values(), key=len, default=[])
        return spaced(blocks) if len(blocks) > 1 else []


def outermost(call: Call, layout: Layout, calls: Sequence[Call]) -> tuple[Call, Layout]:
    """The outermost layer that computes the very map that `call` returns: the last to end that does not pass it on."""
    same = [own for own in calls if own.path and own.output is not None and same_memory(own.output, _output(call))]
    return next((own for own in reversed(same) if not own.passes_on), call), layout


def within_blocks(calls: Sequence[Call]) -> set[str]:
    """Paths of the layers within the network's blocks: within a layer of a class of which it has several.

    What is inside of a block is only a branch of what the block computes.
    """
    layers = {call.path: call.layer for call in calls}
    several = Counter(type(layer) for layer in layers.values())
    blocks = tuple(
        f"{path}."
        for path, layer in layers.items()
        if path and several[type(layer)] > 1 and type(layer) not in _CONTAINERS and any(True for _ in layer.children())
    )
    return {path for path in layers if path.startswith(blocks)}


def spaced(blocks: Sequence[Any]) -> list[Any]:
    """Four evenly spaced ones, the last one among them; all of fewer."""
    count = min(_BLOCKS, len(blocks))
    return [blocks[len(blocks) * k // count - 1] for k in range(1, count + 1)]


def last_of_each_size(maps: Sequence[tuple[Any, Grid]]) -> list[Any]:
    """Of the (map, size) in order, the last one of each size; four evenly spaced ones of maps of one size."""
    last = {size: own for own, size in maps}
    return list(last.values()) if len(last) > 1 else spaced([own for own, _ in maps])


def told_by_network(calls: Sequence[Call], told: Sequence[Call], maps: Sequence[Tensor]) -> list[tuple[Call, Layout]]:
    """The calls of a forward whose outputs are the maps that a network has told; [] if one is not found.

    Args:
        calls: of the forward.
        told: of the run in which the network returned the maps.
        maps: (B, C, H, W), from shallow to deep.
    """
    plain = {(call.path, call.number): call for call in calls}
    found: list[tuple[tuple[Call, Layout], Grid]] = []
    begin = calls[-1].end + told[-1].end if told else 0
    for wanted in reversed(maps):  # from the deepest on: blocks that start as the identity return equal maps
        match = _last_equal([call for call in told if call.end < begin], wanted)
        own = plain.get((match[0].path, match[0].number)) if match else None
        if match is None or own is None or own.output is None or not torch.equal(own.output, _output(match[0])):
            return []
        begin = match[0].begin
        found.insert(0, ((own, match[1]), (wanted.shape[2], wanted.shape[3])))
    chosen = last_of_each_size(found)
    isotropic = len({size for _, size in found}) == 1
    return chosen if isotropic else [outermost(call, layout, calls) for call, layout in chosen]


def _last_equal(calls: Sequence[Call], wanted: Tensor) -> tuple[Call, Layout] | None:
    """The last call that returns this map, and its layout."""
    for call in reversed(calls):
        for layout in _possible(call.output, (wanted.shape[2], wanted.shape[3])) if call.output is not None else ():
            own = layout(_output(call))
            if call.path and not call.passes_on and own.shape == wanted.shape and torch.equal(own, wanted):
                return call, layout
    return None


def _possible(x: Tensor, grid: Grid) -> list[Layout]:
    if x.ndim == 4:
        return [NCHW, NHWC]
    prefix = x.shape[1] - grid[0] * grid[1] if x.ndim == 3 else -1
    return [Layout("tokens", grid, prefix)] if prefix >= 0 else []


def stage_of(call: Call, layout: Layout, calls: Sequence[Call]) -> Stage:
    """What is known of the map that a call returns."""
    feat = Reading((call.path, False), call.number, layout)
    weighted = sum(isinstance(c.layer, _WEIGHTED) and c.end < call.end for c in calls)
    size = layout.size(_output(call))
    for act in calls:
        ends = act.output is not None and act.input is not None and same_memory(act.output, _output(call))
        if ends and is_activation(act.layer) and act.end <= call.end and not act.passes_on:
            preact = replace(feat, place=(act.path, True), number=act.number)
            return Stage(feat, preact, _batchnorm_before(act, calls), weighted, size)
    return Stage(feat, feat, None, weighted, size)


def is_activation(layer: nn.Module) -> bool:
    """Whether a layer computes each number of its output from that of its input."""
    own = type(layer).__module__ in _ACTIVATION_MODULES
    return own and not isinstance(layer, _NO_ACTIVATIONS)


def _batchnorm_before(act: Call, calls: Sequence[Call]) -> str | None:
    """The BatchNorm before the ReLU `act`, between which there is at most a sum with a skip.

    Its output is as large, and no other layer reads it. One beside the ReLU is preferred to one of the skip.
    """
    if not isinstance(act.layer, _RELUS) or act.input is None:
        return None
    parent = act.path.rpartition(".")[0]
    for call in calls:
        if call.path == parent and call.begin < act.begin < call.end and _scales(call.layer):
            return parent  # a BatchNorm and its ReLU in one layer
    found = [c for c in calls if c.end < act.begin and _scales(c.layer) and _shape_of(c) == act.input.shape]
    found = [c for c in found if not _is_read(c, act.begin, calls)]
    beside = [c for c in found if c.path.rpartition(".")[0] == parent]
    return (beside or found)[-1].path if found else None


def _scales(layer: nn.Module) -> bool:
    return isinstance(layer, batchnorm._BatchNorm) and layer.affine


def _shape_of(call: Call) -> torch.Size | None:
    return None if call.output is None else call.output.shape


def _is_read(bn: Call, until: int, calls: Sequence[Call]) -> bool:
    """Whether a layer takes the output of `bn` as its input, up to a moment."""
    return any(
        bn.end < c.begin and c.end < until and not c.passes_on and c.input is not None
        and same_memory(c.input, _output(bn)) for c in calls
    )  # fmt: skip


def _output(call: Call) -> Tensor:
    assert call.output is not None
    return call.output


def _shape(call: Call) -> torch.Size:
    return _output(call).shape


def _is_attention(x: Tensor) -> bool:
    """Whether the last dimension holds shares of one: the weights of an attention."""
    sums = x.sum(-1) if x.ndim == 4 and x.shape[-1] > 1 else x.new_zeros(1)
    return bool((x >= 0).all() and (sums - 1).abs().max() < 1e-3)
