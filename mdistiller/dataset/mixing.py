"""Mixing and erasing of whole batches on the training device: MixUp, CutMix, random erasing, as in torchvision.

What is drawn for an image depends on the seed, the epoch and the image's index alone: not on its batch, the workers,
the ranks, or on where an epoch is resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .batch import host_index, to_device
from .boxes import UNIFORMS, inside, random_boxes

Fields = dict[str, Tensor]
Draw = Callable[[Sequence[np.random.Generator], int], np.ndarray]
# The fields of a mixed batch besides image and target.
MIXED_TARGET, TARGET_SHARE = "mixed_target", "target_share"
# Images whose draws are made at once.
_AT_ONCE = 2**14
# Beyond, all shares are 0.5 as a float32, and NumPy's draws overflow at last.
_LARGEST_ALPHA = 1e18
# What each kind of draw adds to its seed; contrastive.py adds an image's index alone.
_MIXING, _ERASING = 1, 2


class _Rows:
    """Draws by index, made as far as they are asked for: row i depends on the seeds and on i alone.

    Args:
        draw: (generators, count) -> the next `count` rows, as an array (count, ...).
        seeds: of the generators, one each.
    """

    def __init__(self, draw: Draw, seeds: Sequence[tuple[int, ...]]) -> None:
        self._draw = draw
        self._generators = [np.random.Generator(np.random.PCG64(seed)) for seed in seeds]
        self._known: list[np.ndarray] = []
        self._rows = np.empty(0)

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        last = int(index.max(initial=-1))
        if last >= _AT_ONCE * len(self._known):
            while last >= _AT_ONCE * len(self._known):
                self._known.append(self._draw(self._generators, _AT_ONCE))
            self._rows = np.concatenate(self._known)
        return self._rows[index]


class _ByIndex:
    """Draws for the images of an epoch.

    Args:
        seed: EXPERIMENT.SEED.
        kind: tells what is drawn from what else is.
        generators: number of streams that `_draw` takes.
    """

    def __init__(self, seed: int, kind: int, generators: int) -> None:
        self._seed, self._kind, self._generators = seed, kind, generators
        self._of: tuple[int, int, int] = -1, 0, 0
        self._rows: _Rows

    def drawn(self, index: Tensor, epoch: int, height: int, width: int) -> np.ndarray:
        """The rows (B, ...) of the images `index` (B,) on the CPU, which have this height and width."""
        if self._of != (epoch, height, width):
            self._of = epoch, height, width
            seeds = [(self._seed, epoch, self._kind, stream) for stream in range(1, self._generators + 1)]
            self._rows = _Rows(self._draw, seeds)
        return self._rows[index.numpy()]

    def _draw(self, generators: Sequence[np.random.Generator], count: int) -> np.ndarray:
        raise NotImplementedError


class Mixing(_ByIndex):
    """MixUp (arXiv 1710.09412) and CutMix (arXiv 1905.04899): every image takes in a share of the one before it.

    The first image of a batch, or of a rank's share of one, takes in the last. Each image has a share of its own, drawn
    from Beta(alpha, alpha); where both are on, each takes one of the two at random, with equal probability.

    Args:
        mixup, cutmix: alpha of each; 0: off.
    """

    def __init__(self, mixup: float, cutmix: float, seed: int) -> None:
        super().__init__(seed, _MIXING, 3)
        self.mixup, self.cutmix = mixup, cutmix

    def _draw(self, generators: Sequence[np.random.Generator], count: int) -> np.ndarray:
        """(count, 6): the image's own share outside of the box, its share of all pixels, and the box."""
        _, height, width = self._of
        uniform = generators[2].random((count, 3))
        by_mixup, by_cutmix = (_beta(g, alpha, count) for g, alpha in zip(generators, (self.mixup, self.cutmix)))
        cut = uniform[:, 0] < (0.5 if self.mixup else 1.0) if self.cutmix else np.zeros(count, bool)
        box = _cut_box(by_cutmix, uniform[:, 1:], height, width) * cut[:, None]
        left = 1 - box[:, 2] * box[:, 3] / (height * width)
        return np.column_stack([np.where(cut, 1, by_mixup), np.where(cut, left, by_mixup), box])

    def __call__(self, fields: Fields, epoch: int) -> Fields:
        """The batch `fields` with its images mixed, and with the labels of both images of each.

        Needs `image` (B, 3, H, W), `target` (B,) and `index` (B,). `target` becomes the label of the larger share,
        `mixed_target` (B,) int64 that of the other one, and `target_share` (B,) float32 is that share, 0.5 to 1.
        """
        image, target = fields["image"], fields["target"]
        height, width = image.shape[-2:]
        drawn = self.drawn(host_index(fields["index"]).now, epoch, height, width)
        rows = to_device(torch.from_numpy(drawn.astype(np.float32)), image.device)
        weight = rows[:, :1, None, None].masked_fill(inside(rows[:, 2:].long(), height, width), 0).to(image.dtype)
        mixed = image * weight + _before(image) * (1 - weight)
        share, other, own_is_larger = rows[:, 1], _before(target), rows[:, 1] >= 0.5
        return fields | {
            "image": mixed,
            "target": torch.where(own_is_larger, target, other),
            MIXED_TARGET: torch.where(own_is_larger, other, target),
            TARGET_SHARE: torch.where(own_is_larger, share, 1 - share),
        }


def _before(batch: Tensor) -> Tensor:
    """For each entry of a batch the one before it, for the first one the last; in the same memory layout."""
    return torch.cat([batch[-1:], batch[:-1]])


def _beta(generator: np.random.Generator, alpha: float, count: int) -> np.ndarray:
    """(count,) draws of Beta(alpha, alpha); all are 1 for an alpha of 0."""
    alpha = min(alpha, _LARGEST_ALPHA)
    return generator.beta(alpha, alpha, count) if alpha else np.ones(count)


def _cut_box(share: np.ndarray, uniform: np.ndarray, height: int, width: int) -> np.ndarray:
    """(N, 4) first row, first column, height and width of what is cut out, so that about `share` (N,) is left.

    As in torchvision and the paper's code: around a uniform pixel, as far as it lies within the image.
    """
    half = 0.5 * np.sqrt(1 - share)
    ends = []
    for length, place in ((height, uniform[:, 0]), (width, uniform[:, 1])):
        centre, reach = np.floor(place * length), np.floor(half * length)
        first, end = np.maximum(centre - reach, 0), np.minimum(centre + reach, length)
        ends.append((first, end - first))
    (top, rows), (left, columns) = ends
    return np.column_stack([top, left, rows, columns])


class Erasing(_ByIndex):
    """Random erasing (arXiv 1708.04896): with a probability, a rectangle of the normalised image becomes 0.

    Its area is 2 to 33 % of the image's, its height 0.3 to 3.3 times its width, as torchvision's RandomErasing has it.
    A strong view loses the same rectangle, a weak one none.
    """

    def __init__(self, probability: float, seed: int) -> None:
        super().__init__(seed, _ERASING, 1)
        self.probability = probability

    def _draw(self, generators: Sequence[np.random.Generator], count: int) -> np.ndarray:
        """(count, 4) int16: the rectangle of `random_boxes`; of no height where nothing is erased."""
        _, height, width = self._of
        uniform = torch.from_numpy(generators[0].random((count, 1 + UNIFORMS)))
        box, found = random_boxes(uniform[:, 1:], height, width, (0.02, 0.33), (0.3, 3.3), smaller=True)
        erased = found & (uniform[:, 0] < self.probability)
        return (box * erased[:, None]).numpy().astype(np.int16)

    def __call__(self, fields: Fields, epoch: int) -> Fields:
        """The batch `fields`, which has `image` (B, 3, H, W) and `index` (B,), with its rectangles erased."""
        image = fields["image"]
        height, width = image.shape[-2:]
        drawn = self.drawn(host_index(fields["index"]).now, epoch, height, width)
        hole = inside(to_device(torch.from_numpy(drawn), image.device).long(), height, width)
        seen = [name for name in ("image", "image_strong") if name in fields]
        return fields | {name: fields[name].masked_fill(hole, 0) for name in seen}
