"""Metrics of networks, each against a case computed by hand."""

import numpy as np
import pytest

from mdistiller.analysis.measures import (
    accuracy,
    agreement,
    calibration,
    class_correlation,
    class_mean_logits,
    correlation_difference,
    linear_cka,
    mean_logit_difference,
)
from mdistiller.errors import UserError


def two_class_logits(*confidences):
    """Logits that give class 0 these probabilities."""
    p = np.array(confidences)
    return np.stack([np.log(p), np.log(1 - p)], axis=1)


def test_calibration_by_hand():
    # Two images at 0.75, one of them right; one at 0.65, right: (2 * |0.5 - 0.75| + 1 * |1 - 0.65|) / 3.
    c = calibration(two_class_logits(0.75, 0.75, 0.65), np.array([0, 1, 0]), bins=10)
    assert c.count.tolist() == [0, 0, 0, 0, 0, 0, 1, 2, 0, 0]
    assert c.confidence[[6, 7]] == pytest.approx([0.65, 0.75], abs=1e-12)
    assert c.accuracy[[6, 7]].tolist() == [1.0, 0.5] and np.isnan(c.accuracy[0])
    assert c.ece == pytest.approx(100 * 0.85 / 3, abs=1e-10)


def test_one_bin_compares_the_means():
    # mean confidence 0.7, accuracy 0.5
    c = calibration(two_class_logits(0.8, 0.6), np.array([0, 1]), bins=1)
    assert c.ece == pytest.approx(20.0, abs=1e-10)


def test_certain_and_correct_predictions_are_calibrated():
    c = calibration(np.array([[1e3, 0.0], [0.0, 1e3]]), np.array([0, 1]))
    assert c.ece == 0.0 and c.count.tolist() == [0] * 14 + [2]


def test_zero_bins_are_refused():
    with pytest.raises(UserError, match="number of bins must be at least 1, not 0"):
        calibration(two_class_logits(0.6), np.array([0]), bins=0)


def test_accuracy_and_agreement_by_hand():
    a = np.array([[3.0, 1, 0], [0, 2, 1], [0, 0, 5], [1, 0, 0]])
    b = np.array([[9.0, 8, 0], [1, 0, 0], [0, 0, 5], [1, 0, 0]])
    assert agreement(a, b) == 75.0 and agreement(a, a) == 100.0
    assert accuracy(a, np.array([0, 1, 0, 1])) == 50.0


def test_cka_by_hand():
    # Centred: x = (-1, 0, 1), y = (0, -1, 1); (y.x)^2 / (x.x * y.y) = 1 / 4.
    assert linear_cka(np.array([[1.0], [2], [3]]), np.array([[1.0], [0], [2]])) == pytest.approx(0.25, abs=1e-12)


def test_cka_is_invariant_to_rotation_scale_and_shift_only():
    rng = np.random.default_rng(0)
    x, q = rng.standard_normal((50, 4)), np.linalg.qr(rng.standard_normal((4, 4)))[0]
    assert linear_cka(x, 3 * x @ q + 7) == pytest.approx(1.0, abs=1e-12)
    assert linear_cka(x, rng.standard_normal((50, 4))) < 0.3
    assert np.isnan(linear_cka(x, np.ones((50, 2))))


STUDENT = np.array([[2.0, 0], [4, 0], [1, 5]])
TEACHER = np.array([[4.0, 1], [6, 3], [0, 9]])
TARGETS = np.array([0, 0, 1])


def test_mean_logits_by_class_by_hand():
    assert class_mean_logits(STUDENT, TARGETS).tolist() == [[3, 0], [1, 5]]
    # teacher: [[5, 2], [0, 9]]; the diagonal is left out
    assert mean_logit_difference(STUDENT, TEACHER, TARGETS).tolist() == [[0, 2], [1, 0]]


def test_a_class_without_images_is_nan():
    assert np.isnan(class_mean_logits(STUDENT, np.array([0, 0, 0]))[1]).all()


def test_class_correlation_by_hand():
    rising = np.array([[1.0, 2], [2, 4], [3, 6]])
    falling = np.array([[1.0, 3], [2, 2], [3, 1]])
    assert class_correlation(rising) == pytest.approx(np.ones((2, 2)), abs=1e-12)
    assert correlation_difference(rising, falling) == pytest.approx(np.array([[0, 2], [2, 0]]), abs=1e-12)
    assert np.isnan(class_correlation(np.array([[1.0, 2], [1, 4]]))[0, 1]), "a constant logit correlates with nothing"
