"""Logits on which a loss of plain form fails: far apart, equal, masked, of two classes, of one image."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from .checks import check_agrees, check_precision, masked, normal

# (student's logits, teacher's logits, labels) -> ().
LabelledLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def ahead(lead: float, *classes: int) -> Tensor:
    """Logits (B, 5), 0 but for `lead` at one class of each image."""
    logits = torch.zeros(len(classes), 5, dtype=torch.float64)
    logits[torch.arange(len(classes)), torch.tensor(classes)] = lead
    return logits


def constant(value: float) -> Tensor:
    return torch.full((3, 5), value, dtype=torch.float64)


LABELS = torch.tensor([0, 3, 1])
CASES = {
    "far apart": (1e4 * normal(3, 5), 1e4 * normal(3, 5, seed=1), LABELS),
    "a student that is certain and wrong": (ahead(1e4, 1, 2, 4), normal(3, 5, seed=1), LABELS),
    "a teacher of one class": (normal(3, 5), ahead(1e4, 0, 3, 2), LABELS),
    "both of one class": (ahead(1e4, 0, 1, 2), ahead(1e4, 0, 3, 2), LABELS),
    "two classes": (normal(3, 2), 3 * normal(3, 2, seed=1), LABELS % 2),
    "one image": (normal(1, 5), 3 * normal(1, 5, seed=1), LABELS[:1]),
    "classes that the teacher excludes": (
        normal(3, 5), masked(3, 5, classes=[(i, c) for i in range(3) for c in (2, 4)], seed=1), LABELS,
    ),
    "a label that the teacher excludes": (normal(3, 5), masked(3, 5, classes=[(0, 0), (2, 1)], seed=1), LABELS),
    "one class that the teacher leaves": (
        normal(3, 5), masked(3, 5, classes=[(0, c) for c in (1, 2, 3, 4)], seed=1), LABELS,
    ),
}  # fmt: skip
# Losses that divide by the deviation of the logits have no derivative there.
EQUAL = {
    "an undecided student": (constant(0.1), normal(3, 5, seed=1), LABELS),
    "an undecided teacher": (normal(3, 5), constant(0.1), LABELS),
    "both undecided": (constant(0.1), constant(-7.3), LABELS),
}


def check_extremes(loss: LabelledLoss, naive: LabelledLoss) -> None:
    """Value and gradient are those of a naive form that is computed from log-probabilities; also in low precision."""
    for name, logits_and_labels in (CASES | EQUAL).items():
        try:
            _check_one(loss, naive, *logits_and_labels)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def _check_one(loss: LabelledLoss, naive: LabelledLoss, s: Tensor, t: Tensor, target: Tensor) -> None:
    # Both forms round what is as large as the loss.
    size = max(1.0, abs(loss(s, t, target).item()))
    check_agrees(lambda s, t: loss(s, t, target) / size, lambda s, t: naive(s, t, target) / size, s, t, rtol=1e-8)
    check_precision(lambda s, t: loss(s, t, target), s, t, rtol=1e-3, atol=1e-5)
    check_finite(loss, s, t, target)


def check_finite(loss: LabelledLoss, s: Tensor, t: Tensor, target: Tensor) -> None:
    """Value and gradient are finite in float32 and float64."""
    for dtype in (torch.float32, torch.float64):
        leaf = s.to(dtype, copy=True).requires_grad_()
        value = loss(leaf, t.to(dtype), target)
        (gradient,) = torch.autograd.grad(value, leaf)
        assert math.isfinite(value.item()) and gradient.isfinite().all(), f"{value} {gradient}"


def log_softmax(row: list[Tensor]) -> list[Tensor]:
    """Of a list of logits () in plain form."""
    total = torch.logsumexp(torch.stack(row), dim=0)
    return [z - total for z in row]


def kl(log_teacher: list[Tensor], log_student: list[Tensor]) -> Tensor:
    """A sum over the classes to which the teacher gives some probability."""
    terms = [t.exp() * (t - s) for t, s in zip(log_teacher, log_student) if t.exp() > 0]
    return sum(terms, torch.zeros((), dtype=torch.float64))


# The teacher's logits (B, C), for losses of two views.
OF_BOTH_VIEWS = pytest.mark.parametrize(
    "teacher",
    [
        torch.tensor([[1e4, -1e4, 0], [-1e4, 0, 1e4]]),
        torch.zeros(2, 3),
        masked(2, 3, classes=[(0, 1), (1, 1)]).float(),
    ],
    ids=["far apart", "constant", "a class unused"],
)


def students_of(teacher: Tensor) -> list[Tensor]:
    """Leaves: a student with the teacher's logits of the other image, and one that is certain of other classes."""
    known = teacher.nan_to_num(neginf=0.0)
    return [logits.requires_grad_() for logits in (known.flip(0).clone(), -1e4 * known.sign())]
