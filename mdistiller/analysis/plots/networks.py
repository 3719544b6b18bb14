"""Plots of a network's outputs and metrics; each function returns a matplotlib figure and needs no display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...figures import new_figure
from ..measures import Calibration
from .style import COLOURS, GREY, MARKERS, point_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# More classes than this cannot be told apart by colour: the others are grey.
SHOWN_CLASSES = 10


def tsne_figure(points: Mapping[str, np.ndarray], targets: np.ndarray) -> Figure:
    """Scatter plots of t-SNE layouts (N, 2) by network name, side by side; the first ten classes are coloured."""
    figure = new_figure(5.2 * len(points), 5.6)
    panels = figure.subplots(1, len(points), squeeze=False)[0]
    shown = np.unique(targets)[:SHOWN_CLASSES]
    others = ~np.isin(targets, shown)
    for ax, (name, xy) in zip(panels, points.items()):
        ax.scatter(*xy[others].T, s=5, color="#DDDDDD", label="other classes" if others.any() else None)
        for i, c in enumerate(shown):
            ax.scatter(*xy[targets == c].T, s=14, label=str(c), **point_style(i))
        ax.set(title=name, xlabel="t-SNE 1 (no unit)", ylabel="t-SNE 2 (no unit)", xticks=[], yticks=[])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, title="class", markerscale=1.5)
    return figure


def matrices_figure(matrices: Mapping[str, np.ndarray], xlabel: str, ylabel: str, signed: Sequence[str] = ()) -> Figure:
    """Heat maps of matrices by title, side by side; those in `signed` get a diverging colour map with zero in white."""
    figure = new_figure(5.4 * len(matrices), 4.8)
    for ax, (title, matrix) in zip(figure.subplots(1, len(matrices), squeeze=False)[0], matrices.items()):
        most = float(np.nanmax(np.abs(matrix))) or 1.0
        look: Any = {"cmap": "PuOr", "vmin": -most, "vmax": most} if title in signed else {"cmap": "viridis", "vmin": 0}
        image = ax.imshow(matrix, interpolation="nearest", **look)
        figure.colorbar(image, ax=ax, shrink=0.85)
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
        if len(matrix) <= 20:
            ax.set_xticks(range(matrix.shape[1]))
            ax.set_yticks(range(matrix.shape[0]))
    return figure


def cka_figure(cka: np.ndarray, student: str, teacher: str) -> Figure:
    """Heat map of the CKA between each teacher stage (row) and each student stage (column), with the values as text."""
    labels = f"stage of the student {student}", f"stage of the teacher {teacher}"
    figure = matrices_figure({"linear CKA (0 to 1)": cka}, *labels)
    ax = figure.axes[0]
    for (i, j), value in np.ndenumerate(cka):
        ax.annotate(f"{value:.2f}", (j, i), ha="center", va="center", color="white" if value < 0.6 else "black")
    return figure


def reliability_figure(calibrations: Mapping[str, Calibration]) -> Figure:
    """Reliability diagram: accuracy by confidence for each network; a calibrated network lies on the diagonal."""
    figure = new_figure(5.4, 5.4)
    ax = figure.add_subplot()
    ax.plot([0, 100], [0, 100], color=GREY, linestyle="--", label="calibrated")
    for (name, c), colour, marker in zip(calibrations.items(), COLOURS, MARKERS):
        some = c.count > 0
        label = f"{name}, ECE {c.ece:.1f} %"
        ax.plot(100 * c.confidence[some], 100 * c.accuracy[some], color=colour, marker=marker, label=label)
    ax.set(xlabel="confidence, mean of the bin (%)", ylabel="accuracy of the bin (%)", xlim=(0, 100), ylim=(0, 100))
    ax.grid(alpha=0.3)
    figure.legend(loc="outside upper center", frameon=False)
    return figure
