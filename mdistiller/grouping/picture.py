"""A plot of the confusion matrix, its classes ordered by group."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..figures import new_figure
from ..user_files import writing


def draw_confusion(
    path: Path, confusion: np.ndarray, groups: Sequence[Sequence[int]], names: Sequence[str], title: str = ""
) -> None:
    """Write a PNG of where each class's errors went, in percent of them, with a frame around each group.

    Args:
        confusion: (S, S) counts, row true, column predicted; the diagonal is left out.
        groups: lists of indices in [0, S), drawn in this order from the upper left.
        names: (S,) labels of the axes; left out for 50 classes or more.
    """
    order = [i for group in groups for i in group]
    errors = confusion[np.ix_(order, order)].astype(np.float64)
    np.fill_diagonal(errors, 0)
    share = 100 * errors / np.maximum(errors.sum(axis=1, keepdims=True), 1)

    figure = new_figure(8, 7)
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Greys")
    figure.colorbar(image, label="share of the class's errors (%)")
    from matplotlib.patches import Rectangle  # not before `new_figure`, which takes care of the backend

    start = 0
    for k, group in enumerate(groups):
        corner = (start - 0.5, start - 0.5)
        axes.add_patch(Rectangle(corner, len(group), len(group), fill=False, edgecolor=f"C{k % 10}", linewidth=2))
        start += len(group)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    if len(order) < 50:
        labels = [names[i] for i in order]
        axes.set_xticks(range(len(order)), labels, rotation=90)
        axes.set_yticks(range(len(order)), labels)
    with writing(path):
        figure.savefig(path, dpi=80)
