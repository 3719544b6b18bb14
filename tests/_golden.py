"""The pinned values, and the rule that made their weights and inputs (see golden/README.md)."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn

FOLDER = Path(__file__).parent / "golden"


def load(name: str) -> Any:
    """The values of `golden/<name>.json`."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def value(text: str, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float64 value of state entry `key`, of this `shape`, from a random generator seeded by `text`."""
    rs = np.random.RandomState(zlib.crc32(text.encode()) & 0x7FFFFFFF)
    last = key.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        return np.zeros(shape)
    if last == "running_var":
        return rs.uniform(0.5, 1.5, shape)
    if last == "running_mean":
        return 0.1 * rs.standard_normal(shape)
    if last in ("memory_v1", "memory_v2"):
        rows = rs.standard_normal(shape)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)
    if last == "bias":
        return 0.1 * rs.standard_normal(shape)
    if len(shape) == 1:
        return rs.uniform(0.4, 0.8, shape)
    return rs.standard_normal(shape) * math.sqrt(2 / np.prod(shape[1:]))


def fill(module: nn.Module, salt: str, only: set[str] | None = None) -> None:
    """Overwrite the state of `module` (the `only` keys, or all) with its pinned values, through float32.

    The seed of entry `key` is `salt + key`. Call it before `.double()`: the pinned weights are rounded to float32.
    """
    with torch.no_grad():
        for key, tensor in module.state_dict().items():
            if only is None or key in only:
                drawn = torch.from_numpy(np.asarray(value(salt + key, key, tuple(tensor.shape))))
                tensor.copy_(drawn.float())


def images(seed: int, count: int, size: int) -> torch.Tensor:
    """(count, 3, size, size) float64."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal((count, 3, size, size)))


def labels(seed: int, count: int) -> torch.Tensor:
    """(count,) int64 in [0, 100)."""
    return torch.from_numpy(np.random.RandomState(seed).randint(0, 100, count)).long()
