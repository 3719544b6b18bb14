"""Cross-validation of the last layer, against least squares."""

import numpy as np
import torch

from mdistiller.grouping import cross_predict


def test_cross_prediction_is_ridge_regression_without_the_fold():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 4, (40,), generator=generator)
    x = np.hstack([features.numpy(), np.ones((40, 1))])
    y = np.eye(4)[targets.numpy()]
    # The n-th image of a class is in fold n mod 3.
    fold = np.array([int((targets[:i] == targets[i]).sum()) % 3 for i in range(40)])
    strength = 0.1 * np.trace(x.T @ x) / 4
    expected = []
    for i in range(40):
        rows = fold != fold[i]
        # Ridge regression as least squares: one more row a feature, of sqrt(strength).
        a = np.vstack([x[rows], np.sqrt(strength) * np.eye(4)])
        b = np.vstack([y[rows], np.zeros((4, 4))])
        expected.append(int((x[i] @ np.linalg.lstsq(a, b, rcond=None)[0]).argmax()))
    assert cross_predict(features, targets, 3, ridge=0.1).tolist() == expected
