"""A row of the teacher's cache: its outputs for one image in one variant, and how rows are computed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from ...models.own_input import pixels_seen
from ..files.checksum import weights_digest

# What can be stored; `engine.modes` refuses methods that read more.
OUTPUTS = ("logits", "pooled_feat")
NUMPY = {"fp16": np.float16, "fp32": np.float32}
TORCH = {"fp16": torch.float16, "fp32": torch.float32}


class RowLayout:
    """What a row holds: logits and pooled features, or the one of them that the method reads, side by side.

    Args:
        outputs: the names that the method reads.
        dtype: "fp16" or "fp32".
        example: what the teacher returns for some images.

    Attributes:
        width: numbers in a row.
        bytes: of a row, with the one that says whether it is known.
    """

    def __init__(self, outputs: Sequence[str], dtype: str, example: Any) -> None:
        self.outputs = [name for name in OUTPUTS if name in outputs]
        self.dtype = dtype
        self.widths = [output.shape[1] for output in self._select(example)]
        self.width = sum(self.widths)
        self.bytes = self.width * np.dtype(NUMPY[dtype]).itemsize + 1

    def __str__(self) -> str:
        return f"{self.outputs} {self.widths} {self.dtype}"

    def _select(self, output: Any) -> list[Tensor]:
        logits, features = output
        return [logits if name == "logits" else features[name].flatten(1) for name in self.outputs]

    def joined(self, output: Any) -> Tensor:
        """(B, width) float32: the rows of what the teacher returns for B images."""
        return torch.cat(self._select(output), dim=1).float()

    def split(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What the teacher returns, of rows (B, width): float32 logits (B, C), empty if rows have none; features."""
        named = dict(zip(self.outputs, rows.float().split(self.widths, dim=1)))
        return named.pop("logits") if "logits" in named else rows.new_empty(0, dtype=torch.float32), named


class RowSource:
    """How the rows of a teacher's cache are computed.

    Args:
        teacher: the network, whose weights determine the key.
        run: its function: images (B, 3, H, W) -> (logits (B, C), {"pooled_feat": (B, D), ...}).
        arithmetic: what the rounding of `run` depends on, such as "cpu torch.bfloat16 folded".
        image: (1, 3, H, W), an input of the right size, type and device.
        loader: of the training images, with `targets`, `variants`, `variant(index)` and `fingerprint`.
        outputs: which of "logits" and "pooled_feat" a row holds.
        dtype: "fp16" or "fp32", the precision of the rows.

    Attributes:
        rows: number of rows of the whole data set: images times variants.
        pixels: of one image, as the teacher sees it.
    """

    def __init__(
        self, teacher: nn.Module, run: Callable[[Tensor], Any], arithmetic: str, image: Tensor, loader: Any,
        outputs: Sequence[str], dtype: str,
    ) -> None:  # fmt: skip
        self.run, self.image, self.loader = run, image, loader
        self._teacher, self._arithmetic = teacher, arithmetic
        with torch.no_grad():
            self.layout = RowLayout(outputs, dtype, run(image))
        self.rows = len(loader.targets) * loader.variants
        self.pixels = pixels_seen(teacher, image)

    @cached_property
    def key(self) -> str:
        """A digest of the teacher, of its arithmetic, of the data and augmentation, and of the layout of a row."""
        text = f"{_digest(self._teacher)} {self._arithmetic} {self.loader.fingerprint} {self.layout}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def compute(self, image: Tensor) -> Tensor:
        """(B, width) float32: the rows of images (B, 3, H, W). Gradients are the caller's to switch off."""
        return self.layout.joined(self.run(image))


class HitRate:
    """Counts how many rows a cache was asked for, and how many of them it had."""

    def __init__(self) -> None:
        self.asked = self.found = 0

    def count(self, asked: int, found: int) -> None:
        """Add to both."""
        self.asked += asked
        self.found += found

    def __call__(self) -> float:
        """The percentage of the rows requested since the last call that were found in the cache."""
        rate = 100 * self.found / max(self.asked, 1)
        self.asked = self.found = 0
        return rate


def _digest(teacher: nn.Module) -> str:
    """A digest of a network's class and layers, its weights and their names."""
    kind = type(teacher)
    return weights_digest(teacher, f"{kind.__module__}.{kind.__qualname__} {teacher!r}")
