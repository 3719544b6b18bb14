"""The map that a network pools for its classifier, and that classifier, for the methods that read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from yacs.config import CfgNode as CN

from ..console import network_name, one_line
from ..errors import UserError
from ..models.classifier import classifier_of
from ..models.probing import probe_image, undisturbed
from ..models.returned import FORM, described
from .facts import image_size_of

_OTHER = "choose a network that pools its last map for one linear classifier, such as a ResNet"


def last_map_classifier(
    network: nn.Module, role: str, method: str, cfg: CN, image_size: int | None = None
) -> tuple[nn.Linear, torch.Size]:
    """The classifier of a network, and the shape (D, H, W) of the map whose mean it takes: `features["last_map"]`.

    It is checked that the mean of that map is `pooled_feat`, and that classifier(mean) are the logits, by two random
    images in eval mode, so that the classifier may be applied to parts of the map. Nothing changes. Keep the classifier
    in a tuple, not as an attribute: then its parameters have one name in the state dict, the network's.

    Args:
        role, method: "student" or "teacher", and the method's name, for the messages.
        cfg: the whole tree, of which the data set's size is read where there is no `image_size`.
        image_size: of the run; None for a method that is built by hand.

    Raises:
        UserError: the network returns no such map, or tells no such classifier; names both and the next step.
        ValueError: it cannot take images of that size.
    """
    owner = f"{method} reads the map that the {role} {network_name(network)} pools for its classifier"
    logits, features = _probed(network, owner, cfg, image_size)
    last_map = _last_map(features, owner)
    mean, pooled, classifier = last_map.mean((2, 3)), features.get("pooled_feat"), classifier_of(network)
    # Both: a classifier that starts with weights of 0 gives the same logits for every input.
    same = pooled is None or _near(mean, pooled.flatten(1))
    if not (same and _gives(classifier, mean, logits)):
        raise UserError(
            f"{owner}, but its logits are not its classifier's output for the mean of that map {tuple(last_map.shape)} "
            f"(another layer, or a class token, is between them); {_OTHER}"
        )
    return classifier, last_map.shape[1:]


def last_map_shape(
    network: nn.Module, role: str, method: str, cfg: CN, image_size: int | None = None
) -> torch.Size:
    """The shape (D, H, W) of a network's `features["last_map"]`, for a method that reads the map alone.

    Of a network whose logits are not those of the map's mean, such as a transformer with a class token, it is the map
    of the last stage. See `last_map_classifier` for the arguments and the errors.
    """
    owner = f"{method} reads the last map of the {role} {network_name(network)}"
    return _last_map(_probed(network, owner, cfg, image_size)[1], owner).shape[1:]


def pooled_classifier(
    network: nn.Module, role: str, method: str, cfg: CN, image_size: int | None = None
) -> nn.Linear:
    """The classifier of a network, of which it is checked that it gives the logits of `features["pooled_feat"]` (B, D).

    It needs no last map: the pooled feature may be a transformer's class token. See `last_map_classifier` for the rest.
    """
    owner = f"{method} reads the pooled feature of the {role} {network_name(network)}"
    logits, features = _probed(network, owner, cfg, image_size)
    pooled, classifier = features.get("pooled_feat"), classifier_of(network)
    if not isinstance(pooled, Tensor) or not _gives(classifier, pooled.flatten(1), logits):
        raise UserError(
            f"{owner}, but its logits are not its classifier's output for `pooled_feat` (B, D); choose a network that "
            "ends in one linear classifier, such as a ResNet"
        )
    return classifier


def _probed(network: nn.Module, owner: str, cfg: CN, image_size: int | None) -> tuple[Tensor, Mapping[str, Any]]:
    image = probe_image(network, image_size or image_size_of(cfg))
    try:
        with undisturbed(network):
            output = network(image)
    except (RuntimeError, AssertionError) as error:  # a vision transformer asserts that an image has its size
        raise ValueError(f"{owner}, which cannot take images {tuple(image.shape)}: {one_line(error)}") from error
    if not (isinstance(output, (tuple, list)) and len(output) == 2 and isinstance(output[1], Mapping)):
        raise UserError(f"{owner}, which returns {described(output)}; {FORM}")
    return output[0], output[1]


def _last_map(features: Mapping[str, Any], owner: str) -> Tensor:
    last_map = features.get("last_map")
    if not isinstance(last_map, Tensor) or last_map.ndim != 4:
        what = "has none" if last_map is None else f"returns {described(last_map)} as such"
        raise UserError(f'{owner}, but it {what}; let it return features["last_map"] (B, D, H, W), or {_OTHER}')
    return last_map


@torch.no_grad()
def _gives(classifier: nn.Linear, pooled: Tensor, logits: Tensor) -> bool:
    fits = pooled.shape[1] == classifier.in_features and logits.shape[1] == classifier.out_features
    return fits and _near(classifier(pooled), logits)


def _near(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= 1e-3 * other.abs().max())
