"""Curves of accuracy and loss over the epochs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from .runs import Run

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def draw_curves(runs: Mapping[str, Run], path: str | Path) -> None:
    """Draw test accuracy and training loss of labelled runs into the picture `path` (PNG or SVG by its suffix)."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, column, label in zip(
        panels, ("test_acc", "train_loss"), ("test top-1 (%)", "training loss, all parts (nats)")
    ):
        for (name, run), colour in zip(runs.items(), COLOURS):
            panel.plot(run.column("epoch"), run.column(column), color=colour, label=name, marker=".")
        panel.set(xlabel="epoch", ylabel=label)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(runs), frameon=False)
    figure.savefig(path, dpi=150)
