"""Groups of classes that a teacher confuses: from confusion counts to the G groups of DCGD."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import UserError


def count_confusions(targets: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """(C, C) int64: how many samples of class i (row) were predicted as class j (column).

    Args:
        targets: (N,) true classes in [0, C).
        predictions: (N,) predicted classes in [0, C).
    """
    return np.bincount(targets * num_classes + predictions, minlength=num_classes**2).reshape(num_classes, num_classes)


def merge_classes(confusion: np.ndarray, superclass: Sequence[int]) -> np.ndarray:
    """Class counts (C, C) added up to super-class counts (S, S).

    Args:
        superclass: (C,) each class's super-class in [0, S).
    """
    member = np.eye(max(superclass) + 1, dtype=np.int64)[np.asarray(superclass)]
    return member.T @ confusion.astype(np.int64) @ member


def similarity(confusion: np.ndarray) -> np.ndarray:
    """How much the teacher mixes up each two classes, in either direction.

        s = x + x^T,   x[i][j] = errors of i that went to j / all errors of i

    A class without errors has a row of zeros in x: only the errors of other classes that went to it count.

    Args:
        confusion: (S, S) counts >= 0, row true, column predicted; the diagonal counts no errors.

    Returns:
        (S, S) float64 in [0, 2], symmetric, its diagonal zero.
    """
    return _rounded(_shares(confusion))


def _shares(confusion: np.ndarray) -> np.ndarray:
    """x + x^T of `similarity`, not rounded."""
    errors = confusion.astype(np.float64)
    np.fill_diagonal(errors, 0)
    share = errors / np.maximum(errors.sum(axis=1, keepdims=True), 1)
    return share + share.T


def _rounded(values: np.ndarray) -> np.ndarray:
    """To 12 digits, so that values that are mathematically equal (1/3 + 1/3 and 2/3) tie on every machine.

    Round once, at the end: means of rounded values differ in the twelfth digit where the exact means are equal.
    """
    return np.round(values, 12)


def group_by_confusion(confusion: np.ndarray, num_groups: int) -> list[list[int]]:
    """Group the classes (or super-classes) that a teacher confuses.

    With s = `similarity(confusion)`: the most similar pair seeds a group, then the most similar pair among the
    classes left, until there are G; then each remaining class, in ascending order, joins the group with the highest
    mean s to its members so far. Ties go to the lower index: of pairs, to the lower first, then second
    class; of groups, to the one seeded earlier.

    Args:
        confusion: (S, S) counts >= 0, row true, column predicted.
        num_groups: G, from 1 to S / 2.

    Returns:
        G lists of ascending indices in the order of their seeds; every index of [0, S) is in one.

    Raises:
        UserError: the counts are not a square matrix of numbers >= 0, G < 1, S < 2G, or the teacher made no error.

    Cost: O(S^2 log S).
    """
    size = _check(confusion, num_groups)
    s = _shares(confusion)
    groups = _seed(_rounded(s), num_groups)
    seeded = {i for group in groups for i in group}
    for i in range(size):
        if i not in seeded:
            means = _rounded(np.array([s[i, group].mean() for group in groups]))
            groups[int(np.argmax(means))].append(i)  # argmax returns the first of equals
    return [sorted(group) for group in groups]


def _seed(s: np.ndarray, num_groups: int) -> list[list[int]]:
    """The most similar disjoint pairs, taken greedily."""
    first, second = np.triu_indices(len(s), k=1)
    groups: list[list[int]] = []
    taken: set[int] = set()
    for k in np.argsort(-s[first, second], kind="stable"):  # stable: equals stay in ascending order
        pair = [int(first[k]), int(second[k])]
        if len(groups) < num_groups and taken.isdisjoint(pair):
            groups.append(pair)
            taken.update(pair)
    return groups


def _check(confusion: np.ndarray, num_groups: int) -> int:
    """Refuse counts that cannot be grouped; returns the number of classes."""
    shape = confusion.shape
    if confusion.ndim != 2 or shape[0] != shape[1] or (confusion < 0).any():
        raise UserError(f"confusion counts must be a square matrix of numbers >= 0, these have the shape {shape}")
    if num_groups < 1:
        raise UserError(f"the number of groups must be at least 1, it is {num_groups}")
    if shape[0] < 2 * num_groups:
        raise UserError(
            f"{num_groups} groups are seeded by {num_groups} pairs, but there are only {shape[0]} (super-)classes; "
            f"ask for at most {shape[0] // 2} groups"
        )
    if confusion.sum() == np.trace(confusion):
        raise UserError(
            "the teacher makes no error on these images, so there is nothing to group by; count its errors on images "
            "that it was not trained on (--split heldout), or by cross-validation (--split kfold)"
        )
    return shape[0]


def expand(groups: Sequence[Sequence[int]], superclass: Sequence[int]) -> list[list[int]]:
    """Groups of super-classes as groups of their classes, in ascending order."""
    return [[c for c, s in enumerate(superclass) if s in group] for group in groups]
