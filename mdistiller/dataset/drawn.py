"""What is drawn in an epoch whose batches are augmented: the order, and the draws of every image, by seed and epoch.

Images in memory and those that workers read are drawn alike, so that where they lie changes no bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._base import mix_seed
from .augment import Augment
from .augmentation import weak_and_strong
from .batch import to_device


def epoch_draws(augment: Augment, count: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """The order of `count` images, and the draws of their augmentation (count, ...), on the CPU."""
    generator = torch.Generator().manual_seed(mix_seed(seed, epoch))
    return torch.randperm(count, generator=generator), *augment.draw(count, generator)


def view_draws(augment: Augment, count: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """The draws of the view that is not `image`."""
    # (seed, epoch) alone seeds the order, and trailing zeros do not change a seed.
    return augment.draw(count, torch.Generator().manual_seed(mix_seed(seed, epoch, 1)))


def placed(augment: Augment, draws: Sequence[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """An augmentation's draws where it reads them: on the device, but for its `host_draws`."""
    on_device = len(draws) - getattr(augment, "host_draws", 0)
    return *(to_device(drawn, device) for drawn in draws[:on_device]), *draws[on_device:]


class DrawnViews:
    """The augmentation of batches that workers read, (B, H, W, 3) uint8; it draws as `InMemoryLoader` does.

    Attributes:
        augment: that of `image`.
        other: that of the other view; None: there is none.
    """

    def __init__(self, augment: Augment, count: int, seed: int) -> None:
        self.augment = augment
        self.other: Augment | None = None
        self._count, self._seed, self._epoch = count, seed, -1
        self._draws: list[tuple[Tensor, ...]] = []

    @property
    def image_is_weak(self) -> bool:
        """Whether `image` is the weak view."""
        return weak_and_strong(self.augment)[0] is self.augment

    def with_views(self) -> None:
        """Give the other view too from now on."""
        self.other = weak_and_strong(self.augment)[self.image_is_weak]
        self._epoch = -1

    def __call__(self, images: Tensor, index: Tensor, epoch: int) -> list[Tensor]:
        """`image`, and the other view if there is one, of the images with the `index` (B,) on the CPU."""
        if self._epoch != epoch:
            key = self._count, self._seed, epoch
            self._draws = [epoch_draws(self.augment, *key)[1:]]
            self._draws += [view_draws(self.other, *key)] if self.other else []
            self._epoch = epoch
        augments = [self.augment, *([self.other] if self.other else [])]
        shown = []
        for augment, draws in zip(augments, self._draws):
            own = [drawn[index] for drawn in draws]
            shown.append(augment.apply(images, *placed(augment, own, images.device)))
        return shown
