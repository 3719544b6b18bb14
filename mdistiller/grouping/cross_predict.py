"""Predictions for images that the classifier was not fitted on, by cross-validation of a network's last layer."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from ..errors import UserError


def cross_predict(features: Tensor, targets: Tensor, folds: int, ridge: float = 1e-3) -> Tensor:
    """Each image's class by a linear classifier that was fitted without it, on a teacher's pooled features.

    The images of each class are dealt to the folds in turn. For every fold, ridge regression of the one-hot targets
    on the other folds' features (with a constant) is solved exactly and scored on the fold:

        W = (X^T X + ridge * mean(diag X^T X) * I)^-1 X^T Y

    The features themselves were learnt from all the images, so that this still flatters the teacher; but it leaves
    errors to count where the teacher has none.

    Args:
        features: (N, D).
        targets: (N,) int64.
        folds: K >= 2.

    Returns:
        (N,) int64 predicted classes.

    Raises:
        UserError: fewer than two folds.

    Cost: O(N D^2 + K D^3).
    """
    if folds < 2:
        raise UserError(f"cross-validation needs two folds at least, --folds is {folds}")
    x = torch.cat([features.double(), torch.ones(len(features), 1, dtype=torch.float64)], dim=1)
    y = nn.functional.one_hot(targets).double()
    fold = torch.empty_like(targets)
    for c in targets.unique():
        members = (targets == c).nonzero()[:, 0]
        fold[members] = torch.arange(len(members)) % folds
    gram, moment = x.T @ x, x.T @ y
    penalty = ridge * gram.diagonal().mean() * torch.eye(x.shape[1], dtype=torch.float64)
    predictions = torch.empty_like(targets)
    for k in range(folds):
        part = fold == k
        others = gram - x[part].T @ x[part] + penalty, moment - x[part].T @ y[part]
        predictions[part] = (x[part] @ torch.linalg.solve(*others)).argmax(dim=1)
    return predictions
