"""The policies of DATASET.AUGMENT: of single images, and of batches that lie on the training device.

RandAugment and TrivialAugment are torchvision's; FixMatch's is in `fixmatch`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from . import fixmatch
from .batch import to_device

# Torchvision's defaults, which are those of its published recipes. RandAugment applies two operations of magnitude 9 of
# 31; TrivialAugment one, of any of 31 magnitudes.
_CLASSES: dict[str, Callable[[], Any]] = {"randaugment": v2.RandAugment, "trivialaugment": v2.TrivialAugmentWide}
# Those that draw and change batches themselves: modules with `draw` and `apply`.
_OWN = {"fixmatch": fixmatch}
POLICIES = (*_CLASSES, *_OWN)


@cache
def policy_of(name: str) -> Any:
    """Torchvision's transform of its policy `name`: images (..., 3, H, W) uint8, all of them in the same way."""
    return _CLASSES[name]()


def apply_policy(name: str, image: Tensor) -> Tensor:
    """One image (H, W, 3) uint8 changed by a policy, which draws from torch's CPU generator."""
    if name in _OWN:
        return _OWN[name].apply(image[None], _OWN[name].draw(1))[0]
    changed: Tensor = policy_of(name)(image.permute(2, 0, 1)).permute(1, 2, 0)
    return changed


def draw_policy(name: str, count: int, generator: torch.Generator) -> Tensor:
    """The draws of a policy for `count` images, (count, ...), for `apply_drawn`.

    Of torchvision's policies (count, operations) int16: a number says the operation, its magnitude and its sign.
    """
    if name in _OWN:
        return _OWN[name].draw(count, generator)
    policy, names = policy_of(name), len(_space(name))
    operations, bins = getattr(policy, "num_ops", 1), policy.num_magnitude_bins
    shape = count, operations
    operation = torch.randint(names, shape, generator=generator)
    # Drawn for both policies, so that a draw has one form.
    drawn = torch.randint(bins, shape, generator=generator)
    magnitude = torch.full(shape, policy.magnitude) if hasattr(policy, "magnitude") else drawn
    negative = torch.randint(2, shape, generator=generator)
    return ((operation * bins + magnitude) * 2 + negative).to(torch.int16)


def apply_drawn(name: str, images: Tensor, draws: Tensor) -> Tensor:
    """Images (B, H, W, 3) uint8, each changed by its own `draws` (B, ...), which are read on the CPU.

    Images of the same draw are changed together: a GPU's time goes by the number of operations, not of images.
    """
    if name in _OWN:
        return _OWN[name].apply(images, draws)
    images = images.permute(0, 3, 1, 2)
    for draw in draws.long().unbind(1):
        order = draw.argsort(stable=True)
        values, counts = draw[order].unique_consecutive(return_counts=True)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        order, back = to_device(order, images.device), to_device(back, images.device)
        groups = images.index_select(0, order).split(counts.tolist())
        changed = [_changed(name, group, value) for group, value in zip(groups, values.tolist())]
        images = torch.cat(changed).index_select(0, back)
    return images.permute(0, 2, 3, 1)


def _space(name: str) -> dict[str, tuple[Callable[..., Tensor | None], bool]]:
    """The operations of a policy: the magnitudes of each, and whether it has a sign."""
    space: dict[str, Any] = policy_of(name)._AUGMENTATION_SPACE
    return space


def _changed(name: str, images: Tensor, draw: int) -> Tensor:
    """Images (B, 3, H, W), all changed by one draw."""
    policy = policy_of(name)
    code, negative = divmod(draw, 2)
    operation, bin_ = divmod(code, policy.num_magnitude_bins)
    title, (magnitudes, signed) = list(_space(name).items())[operation]
    known = _magnitudes(magnitudes, policy.num_magnitude_bins, *images.shape[-2:])
    magnitude = 0.0 if known is None else known[bin_] * (-1 if signed and negative else 1)
    changed: Tensor = policy._apply_image_or_video_transform(
        images, title, magnitude, interpolation=policy.interpolation, fill=policy._fill
    )
    return changed


@cache
def _magnitudes(function: Callable[..., Tensor | None], bins: int, height: int, width: int) -> list[float] | None:
    values = function(bins, height, width)
    return None if values is None else [float(value) for value in values]
