"""The image classifiers of torchvision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn as nn
from torch import Tensor

from ...errors import UserError
from ._source import IMAGENET, NativeInput, Source, loading, unknown_network

PREFIX = "torchvision/"
# Networks whose second classifier, for training alone, is left out.
_AUXILIARY = ("googlenet", "inception_v3")


class Torchvision(Source):
    def build(self, name: str, num_classes: int, image_size: int, pretrained: bool) -> nn.Module:
        import torchvision

        self._known(name)
        options: dict[str, Any] = {"num_classes": num_classes}
        native = self.native_input(name).size
        if name in _AUXILIARY:
            options |= {"aux_logits": False, "init_weights": not pretrained}
        if name.startswith("vit_"):
            options["image_size"] = image_size or native
        try:
            network = torchvision.models.get_model(name, weights=None, **options)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise UserError(f"{PREFIX}{name} takes no images of {image_size or native} pixels ({error})") from error
        network.fresh_head = False
        if pretrained:
            weights = _published(name)
            with loading(PREFIX + name, weights.url):
                state = dict(weights.get_state_dict(progress=False, check_hash=True))
            if name in _AUXILIARY:
                network.transform_input = True
            network.fresh_head = _load(network, state, PREFIX + name)
        return network

    def native_input(self, name: str, image_size: int = 0) -> NativeInput:
        self._known(name)
        weights = _published(name)
        if weights is None:
            return IMAGENET
        preset = weights.transforms()
        size = preset.crop_size[0]
        how = preset.interpolation.value
        return NativeInput(size, tuple(preset.mean), tuple(preset.std), size / preset.resize_size[0], how)

    def num_classes(self, name: str) -> int:
        self._known(name)
        return 1000

    def names(self) -> list[str]:
        import torchvision

        return [PREFIX + name for name in torchvision.models.list_models(module=torchvision.models)]

    def _known(self, name: str) -> None:
        known = [own.removeprefix(PREFIX) for own in self.names()]
        if name not in known:
            raise unknown_network(name, PREFIX, known)


def _published(name: str) -> Any:
    """The published weights that torchvision recommends."""
    from torchvision.models import get_model_weights

    return getattr(get_model_weights(name), "DEFAULT", None)


def _load(network: Any, state: dict[str, Tensor], name: str) -> bool:
    """Load the entries that fit; whether the classifier is left out, as it is for other classes.

    Raises:
        UserError: other entries do not fit.
    """
    own = network.state_dict()
    if hasattr(network, "encoder") and "encoder.pos_embedding" in state:
        from torchvision.models.vision_transformer import interpolate_embeddings

        state = dict(interpolate_embeddings(network.image_size, network.patch_size, _copied(state)))
    state = {key: value for key, value in state.items() if not key.startswith(("aux", "AuxLogits"))}
    fitting = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    missing = {key.rpartition(".")[0] for key in {*own, *state} - fitting.keys()}
    if len(missing) > 1:
        raise UserError(f"the published weights of {name} do not fit: {', '.join(sorted(missing)[:4])}")
    network.load_state_dict(own | fitting)
    return bool(missing)


def _copied(state: Mapping[str, Tensor]) -> Any:
    from collections import OrderedDict

    return OrderedDict(state)
