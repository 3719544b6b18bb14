"""The pinned losses on plain tensors (golden/new_methods_tensors.json), and the inputs from which they were made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from .. import _golden

ROWS: list[dict[str, Any]] = _golden.load("new_methods_tensors")


def rows(method: str, **opts: Any) -> list[Any]:
    """The rows of `method` that have these options, as parameters of a test."""
    own = [row for row in ROWS if row["method"] == method and opts.items() <= row["opts"].items()]
    assert own, f"no row of {method}"
    return [pytest.param(row, id=f"{row['what']} {row['opts']}") for row in own]


def random_state(seed: int) -> np.random.RandomState:
    return np.random.RandomState(seed)


def normal(seed: int, shape: Sequence[int], scale: float = 1.0) -> Tensor:
    """A differentiable float64 tensor from NumPy's legacy generator."""
    return torch.from_numpy(scale * random_state(seed).standard_normal(tuple(shape))).requires_grad_()


def labels(seed: int) -> Tensor:
    return torch.from_numpy(random_state(seed + 3).randint(0, 100, 8)).long()


def student_logits(seed: int) -> Tensor:
    return normal(seed + 1, (8, 100), 2)


def teacher_logits(seed: int) -> Tensor:
    """Mostly right in rows 0, 2, 4 and 6, mostly wrong in the others; without a gradient."""
    logits, target = normal(seed + 2, (8, 100), 3).detach().clone(), labels(seed)
    for i in (0, 2, 4, 6):
        logits[i, target[i]] += 8
    return logits


def check(row: Mapping[str, Any], loss: Callable[[], Tensor], **inputs: Tensor) -> None:
    """The loss of the `inputs`, and its gradient for each that the row names, agree with the row.

    Args:
        loss: called without arguments.
        inputs: what `loss` computes it from, by their names in row["grad"].
    """
    total = loss()
    total.backward()
    assert total.item() == pytest.approx(row["loss"], rel=1e-6)
    for name, pinned in row["grad"].items():
        gradient = inputs[name].grad
        assert gradient is not None, name
        assert gradient.norm().item() == pytest.approx(pinned["norm"], rel=1e-6), name
        first = gradient.flatten()[: len(pinned["first"])].tolist()
        assert first == pytest.approx(pinned["first"], rel=1e-6, abs=1e-9 * pinned["norm"]), name


def two_views(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The student's and the teacher's logits of the weak view, then of the strong one; labels are the weak view's."""
    strong, target = teacher_logits(seed + 50), labels(seed)
    for i in (0, 4):
        strong[i, target[i]] += 8
    return student_logits(seed), teacher_logits(seed), student_logits(seed + 50), strong
