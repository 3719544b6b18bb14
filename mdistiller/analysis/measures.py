"""Metrics of trained networks from their outputs: calibration, agreement, similarity of features, class correlation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..errors import UserError

Array = np.ndarray


@dataclass(frozen=True)
class Calibration:
    """Images sorted into bins of equal width by the confidence of their prediction, from 0 to 1.

    Attributes:
        count: (K,) images in each bin.
        confidence, accuracy: (K,) their means, in [0, 1]; NaN in an empty bin.
    """

    count: Array
    confidence: Array
    accuracy: Array

    @property
    def ece(self) -> float:
        """Expected calibration error in percent: the mean over the images of |accuracy - confidence| of their bins."""
        gap = np.abs(self.accuracy - self.confidence)
        return float(100 * np.sum(np.where(self.count > 0, gap * self.count, 0)) / self.count.sum())


def calibration(logits: Array, targets: Array, bins: int = 15) -> Calibration:
    """Confidence and accuracy of predictions in K = `bins` bins ((k - 1) / K, k / K].

    Args:
        logits: (N, C).
        targets: (N,) int.

    Raises:
        UserError: fewer than one bin.

    Reference: Guo et al. 2017, arXiv 1706.04599, section 2.
    """
    if bins < 1:
        raise UserError(f"the number of bins must be at least 1, not {bins}")
    probabilities = torch.from_numpy(logits).softmax(dim=1).numpy()
    confidence = probabilities.max(axis=1)
    hit = probabilities.argmax(axis=1) == targets
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    some = np.where(count > 0, count, np.nan)
    return Calibration(
        count,
        np.bincount(place, weights=confidence, minlength=bins) / some,
        np.bincount(place, weights=hit, minlength=bins) / some,
    )


def accuracy(logits: Array, targets: Array) -> float:
    """Top-1 in percent; logits (N, C), targets (N,)."""
    return float(100 * np.mean(logits.argmax(axis=1) == targets))


def agreement(logits_a: Array, logits_b: Array) -> float:
    """Share of the images that both networks put into the same class, in percent; logits (N, C) each."""
    return float(100 * np.mean(logits_a.argmax(axis=1) == logits_b.argmax(axis=1)))


def linear_cka(x: Array, y: Array) -> float:
    """Similarity of two sets of features of the same images, in [0, 1]; invariant to rotation and scale.

        CKA = ||Y^T X||_F^2 / (||X^T X||_F * ||Y^T Y||_F),   columns centred

    Args:
        x, y: (N, D) and (N, E).

    Returns:
        NaN where one of them is constant.

    Reference: Kornblith et al. 2019, arXiv 1905.00414, section 3.
    """
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    scale = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(np.linalg.norm(y.T @ x) ** 2 / scale) if scale > 0 else float("nan")


def class_mean_logits(logits: Array, targets: Array) -> Array:
    """(C, C): row c is the mean of the logits (N, C) over the images of class c; NaN if it has none."""
    classes = logits.shape[1]
    count = np.bincount(targets, minlength=classes)
    sums = np.zeros((classes, classes))
    np.add.at(sums, targets, logits)
    return sums / np.where(count > 0, count, np.nan)[:, None]


def mean_logit_difference(student: Array, teacher: Array, targets: Array) -> Array:
    """(C, C): |student - teacher| of their `class_mean_logits`; the diagonal is set to zero, as in the original.

    Args:
        student, teacher: (N, C) logits.
        targets: (N,) int.
    """
    difference = np.abs(class_mean_logits(student, targets) - class_mean_logits(teacher, targets))
    np.fill_diagonal(difference, 0)
    return difference


def class_correlation(logits: Array) -> Array:
    """(C, C) in [-1, 1]: correlation between the logits (N, C) of every two classes; NaN for a constant logit."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.corrcoef(logits, rowvar=False)


def correlation_difference(student: Array, teacher: Array) -> Array:
    """(C, C) in [-2, 2]: `class_correlation` of the student minus that of the teacher; logits (N, C) each."""
    return class_correlation(student) - class_correlation(teacher)
