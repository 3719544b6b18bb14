"""Any image classifier as a network of this library: image -> (logits, features), with the weights' own names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..errors import UserError
from ..registry import unknown_name
from ._network import Network
from .layouts import Layout
from .probing import Call, calls_of, probe_image, undisturbed
from .returned import described, returned
from .stages import Head, Maps, Reading, Stage, find_head, last_map_of, stage_of, told_by_network
from .taps import Captured, Place, Taps

_STEM_LAYERS = 3  # a stem has no more convolutions than that
_LARGE = 224


class WrappedNetwork(Network):
    """A network of another library: image (B, 3, H, W) -> (logits (B, C), features by name).

    The features are {"feats", "preact_feats", "last_map", "pooled_feat"}. feats and preact_feats are lists of maps
    (B, C, H, W), [] of a network without any, such as a perceptron; pooled_feat (B, D) is the classifier's input.
    last_map (B, D, H, W) is the map of which that is the mean, where a layer takes or returns one; else the last of
    feats, such as the tokens of a transformer that classifies its class token. The state dict is the bare network's.

    Args:
        bare: a network that gives logits; it gets hooks that do nothing outside of the wrapped network's forward.
        stages: its feature maps, from shallow to deep.
        head: its classifier; None where none was found: pooled_feat is then the mean of the last map.
        name: for messages.
        last: the map whose mean the classifier takes; None where no layer takes or returns it.
        clone: places whose tensors are copied, as the network writes into them later.

    Attributes:
        bare: the network itself.
        name: such as "timm/resnet18".
        feat_names: paths of the layers in `bare` that give the maps.
        stem_in_feats: whether the first map is a stem's.
        classifier_width: D, of the classifier's input; 0 if no classifier was found.
        fresh_head: whether a source's weights were loaded, all but the classifier's, which are for other classes.
    """

    def __init__(
        self,
        bare: nn.Module,
        stages: Sequence[Stage],
        head: Head | None,
        name: str,
        last: Reading | None = None,
        clone: Iterable[Place] = (),
    ) -> None:
        super().__init__()
        self.bare, self.name, self.fresh_head = bare, name, False
        self.feat_names = [stage.feat.place[0] for stage in stages]
        self.stem_in_feats = len(stages) > 1 and stages[0].weighted <= _STEM_LAYERS
        self.classifier_width = head.width if head else 0
        self._feats = tuple(stage.feat for stage in stages)
        self._preacts = tuple(stage.preact for stage in stages)
        self._pooled = head.inputs if head else ()
        self._last = last
        self._batchnorms = tuple(stage.batchnorm for stage in stages)
        self._taps = Taps(bare, places(self), clone)
        self.training = bare.training
        self._prefix = ""
        self.register_load_state_dict_post_hook(_with_own_names)

    def forward(self, image: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """(B, 3, H, W) -> logits (B, C) and the features; see the class."""
        logits, captured = self._taps.run(self.bare, image)
        if isinstance(logits, (tuple, list, Mapping)):  # not what torch.fx traces
            raise UserError(
                f"{self.name} returns {described(logits)} in training, and its logits alone in evaluation; build it "
                "without auxiliary classifiers, or let it return (logits, features by name)"
            )
        return logits, self.features(captured)

    def features(self, captured: Captured) -> dict[str, Any]:
        """The features by name, from what the taps have captured."""
        feats = [_read(captured, reading) for reading in self._feats]
        preacts = [
            own if before == after else _read(captured, before)
            for own, before, after in zip(feats, self._preacts, self._feats)
        ]
        vectors = [_mean(_read(captured, reading), dims) for reading, dims in self._pooled] or [feats[-1].mean((2, 3))]
        pooled = vectors[0] if len(vectors) == 1 else torch.stack(vectors).mean(0)
        features = {"feats": feats, "preact_feats": preacts, "pooled_feat": pooled}
        last = _read(captured, self._last) if self._last else feats[-1] if feats else None
        return features if last is None else {**features, "last_map": last}

    def get_classifier(self) -> nn.Module:
        """The layer from the pooled feature to the logits.

        Raises:
            UserError: it has none, or several.
        """
        if len(self._pooled) != 1:
            raise UserError(
                f"{self.name} has {len(self._pooled) or 'no'} layers that give its logits, not one; choose a network "
                "with one linear classifier, such as a ResNet"
            )
        return self.bare.get_submodule(self._pooled[0][0].place[0])

    def remove_taps(self) -> None:
        """Leave the bare network without hooks; the wrapped one cannot be used any more."""
        self._taps.remove()

    def get_bn_before_relu(self) -> list[nn.Module]:
        """The BatchNorm directly before the ReLU that ends each of the deepest stages; the last is the last map's.

        Raises:
            UserError: the deepest stage has none.
        """
        found: list[nn.Module] = []
        for path in reversed(self._batchnorms):
            if path is None:
                break
            found.insert(0, self.bare.get_submodule(path))
        if not found:
            last = f" {self.feat_names[-1]}" if self.feat_names else ""
            raise UserError(
                f"{self.name} has no BatchNorm before a ReLU at the end of its last stage{last}, which "
                "OFD reads its margins from; choose a network that has one, such as a ResNet, or another method"
            )
        return found

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The bare network's state, as `nn.Module.state_dict` returns it."""
        if args:  # as older calls pass them
            return self.bare.state_dict(*args)
        return self.bare.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the bare network's state, as `nn.Module.load_state_dict` does."""
        return self.bare.load_state_dict(state_dict, strict=strict, assign=assign)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Called when the state of a module is loaded of which this network is a part."""
        self._prefix, bare = prefix, self.bare
        own = {*bare._modules, *bare._parameters, *bare._buffers}
        for key in [key for key in state_dict if key.startswith(prefix)]:
            if key.removeprefix(prefix).split(".")[0] in own:
                state_dict[f"{prefix}bare.{key.removeprefix(prefix)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _with_own_names(network: WrappedNetwork, keys: Any) -> None:
    """Let the missing and the unexpected keys be those of the file."""
    inner = f"{network._prefix}bare."
    for names in keys:
        names[:] = [network._prefix + name.removeprefix(inner) if name.startswith(inner) else name for name in names]


def _read(captured: Captured, reading: Reading) -> Tensor:
    return reading.layout(captured[reading.place][reading.number])


def _mean(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.mean(dims) if dims else x


def places(network: WrappedNetwork) -> list[Place]:
    """What the taps of a wrapped network read."""
    last = (network._last,) if network._last else ()
    return [reading.place for reading in (*network._feats, *network._preacts, *last)] + [
        reading.place for reading, _ in network._pooled
    ]


def wrap(
    module: nn.Module, num_classes: int = 0, image_size: int = 224, feats: Sequence[str] = (), name: str = ""
) -> nn.Module:
    """`module` as a network of this library; one that already returns (logits, features) comes back unchanged.

    Its feature maps are found by one forward of two random images in eval mode, which leaves its weights, its mode and
    the random generators as they are. In-place activations are turned off.

    Args:
        module: (B, 3, H, W) -> logits (B, C).
        num_classes: C; 0 for any.
        image_size: height and width of the images, in pixels.
        feats: paths of the layers whose outputs are the feature maps, from shallow to deep; empty: found.
        name: of the network, for messages; empty: its class.

    Raises:
        UserError: it takes no such images, gives no logits or those of other classes, has no layer of a name in
            `feats`, or neither maps nor a classifier, or does not compute the same when its layers are observed.
    """
    if isinstance(module, WrappedNetwork):
        return module
    name = name or type(module).__name__
    image = probe_image(module, image_size)
    with undisturbed(module):
        try:
            output = module(image)
        except Exception:
            output = returned(module, image, name)  # says how to change the images, if that is what it takes
        if isinstance(output, (tuple, list)) and len(output) == 2 and isinstance(output[1], Mapping):
            if feats:
                raise UserError(f"{name} returns its features itself; name no layers {list(feats)} of it")
            return module
        if any(layer._compiled_call_impl or "_orig_mod" in layer._modules for layer in module.modules()):
            raise UserError(
                f"{name} is compiled (torch.compile), and compiled layers cannot be observed; give the network "
                "as it was before, and let the training compile it (SOLVER.COMPILE)"
            )
        logits = _checked(output, len(image), num_classes, name)
        in_place = _in_place_layers(module)
        _set_in_place(in_place, False)
        own, calls = calls_of(module, lambda: module(image))
        needs_in_place = not torch.equal(own, logits)
        if needs_in_place:  # it drops what such a layer returns
            _set_in_place(in_place, True)
            _, calls = calls_of(module, lambda: module(image))
        stages, head = _found(module, image, calls, logits, feats, name)
        last = last_map_of(calls, head, stages) if head else None
        network = WrappedNetwork(module, stages, head, name, last)
        if needs_in_place or not _kept(network, image, logits):
            network.remove_taps()
            network = WrappedNetwork(module, stages, head, name, last, clone=places(network))
            if not _kept(network, image, logits):
                network.remove_taps()
                raise UserError(f"{name} computes something else each time in eval mode; let it return its features")
    network.training = module.training
    return network


def _checked(output: Any, images: int, classes: int, name: str) -> Tensor:
    if not (isinstance(output, Tensor) and output.ndim == 2 and len(output) == images and output.is_floating_point()):
        raise UserError(
            f"{name} returns {described(output)} for {images} images; it must return logits (B, C), or (logits, "
            "features by name)"
        )
    if classes and output.shape[1] != classes:
        raise UserError(f"{name} returns logits of {output.shape[1]} classes, not of {classes}; give it num_classes")
    return output


def _in_place_layers(module: nn.Module) -> list[Any]:
    return [layer for layer in module.modules() if getattr(layer, "inplace", None) is True]


def _set_in_place(layers: Iterable[Any], to: bool) -> None:
    for layer in layers:
        layer.inplace = to


def _found(
    module: nn.Module, image: Tensor, calls: Sequence[Call], logits: Tensor, feats: Sequence[str], name: str
) -> tuple[list[Stage], Head | None]:
    """The stages and the classifier of a network."""
    head = find_head(calls, logits)
    if feats:
        maps = _named(module, calls, feats, name)
    else:
        maps = _told(module, image, calls) or _observed(module, calls, head)
    if not maps and head is None:
        raise UserError(
            f"{name} has neither a layer that returns a feature map (B, C, H, W) of images of this size, nor a "
            "classifier (a last linear layer, or 1x1 convolution); let it return (logits, features by name)"
        )
    return [stage_of(call, layout, calls) for call, layout in maps], head


def _named(
    module: nn.Module, calls: Sequence[Call], feats: Sequence[str], name: str
) -> list[tuple[Call, Layout]]:
    """The maps of the layers `feats`."""
    found = []
    maps = Maps(calls, None).found
    for path in feats:
        own = [(call, layout) for call, layout in maps if call.path == path]
        if path not in dict(module.named_modules()):
            raise unknown_name(f"layer of {name}", path, {call.path for call, _ in maps})
        if not own:
            shapes = [tuple(call.output.shape) for call in calls if call.path == path and call.output is not None]
            what = f"returns {shapes[-1]}" if shapes else "is not called, or returns no tensor"
            raise UserError(f"layer {path} of {name} {what}, which is no feature map (B, C, H, W)")
        found.append(own[-1])
    ends = [call.end for call, _ in found]
    if ends != sorted(ends):
        order = [call.path for call, _ in sorted(found, key=lambda own: own[0].end)]
        raise UserError(f"the layers {list(feats)} of {name} must go from shallow to deep: {order}")
    return found


def _told(module: nn.Module, image: Tensor, calls: Sequence[Call]) -> list[tuple[Call, Layout]]:
    """The maps among the intermediate ones that the network itself can return."""
    if not hasattr(module, "forward_intermediates"):
        return []
    try:
        maps, told = calls_of(module, lambda: module.forward_intermediates(image, intermediates_only=True))  # type: ignore
        return told_by_network(calls, told, maps)
    except Exception:  # foreign code, which is only asked for a hint
        return []


def _observed(module: nn.Module, calls: Sequence[Call], head: Head | None) -> list[tuple[Call, Layout]]:
    """The maps that the module's calls show.

    A map of 1x1 may be a pooled one; where images are so small that it may also be a stage's, larger ones tell.
    """
    maps = Maps(calls, head.begin if head else None)
    if not any(layout.size(call.output) == (1, 1) for call, layout in maps.found):  # type: ignore[arg-type]
        return maps.chosen()
    image = probe_image(module, _LARGE)
    try:
        logits, large = calls_of(module, lambda: module(image))
        larger = find_head(large, logits)
        found = Maps(large, larger.begin if larger else None).chosen()
    except Exception:  # it takes images of one size only
        return maps.chosen()
    own = {(call.path, call.number): (call, layout) for call, layout in maps.found}
    if not all((call.path, call.number) in own for call, _ in found):
        return maps.chosen()
    pairs = [(own[call.path, call.number], layout) for call, layout in found]
    return [(call, small if small.kind == "tokens" else layout) for (call, small), layout in pairs]


def _kept(network: WrappedNetwork, image: Tensor, logits: Tensor) -> bool:
    """Whether the wrapped network returns these logits, and its features as they were when they were captured."""
    twins = Taps(network.bare, places(network), clone=places(network))
    (own, features), clones = twins.run(network, image)
    twins.remove()
    then = network.features(clones)
    same = all(
        torch.equal(one, other) for kind in ("feats", "preact_feats") for one, other in zip(features[kind], then[kind])
    )
    return same and torch.equal(own, logits) and torch.equal(features["pooled_feat"], then["pooled_feat"])
