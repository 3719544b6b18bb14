"""Curves of accuracy, of every loss term and of the learning rate over the epochs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...console import reason, warn
from ...experiments.runs import Run, read_run
from ...figures import new_figure
from .style import line_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Up to this many epochs, each one gets a marker.
MARKED_EPOCHS = 30
AGREEMENT = "agreement with the teacher (%)"  # of runs on images without labels


@dataclass
class Panel:
    """One pair of axes: its label with unit, and (run, column, style) by the name of each line."""

    label: str
    lines: dict[str, tuple[Run, str, dict[str, Any]]] = field(default_factory=dict)
    scale: str = "linear"


def panels_of_runs(runs: Mapping[str, Run]) -> list[Panel]:
    """Panels that compare runs: test accuracy, total loss, each loss term; a line for each run that has the metric."""
    columns = {name: _totals(run) | {_loss_label(t): c for t, c in run.losses.items()} for name, run in runs.items()}
    labels = dict.fromkeys(label for of_run in columns.values() for label in of_run)
    panels = [Panel(label) for label in labels]
    for index, (name, run) in enumerate(runs.items()):
        for panel in panels:
            column = columns[name].get(panel.label)
            if column in run.columns:
                panel.lines[name] = (run, str(column), line_style(index))
    return [panel for panel in panels if panel.lines]


def _totals(run: Run) -> dict[str, str]:
    top1 = "test top-1 (%)" if run.score == "test_acc" else AGREEMENT
    return {top1: run.score, "training loss, sum of its terms (nats)": "train_loss"}


def panels_of_run(run: Run) -> list[Panel]:
    """Panels of one run: test and training accuracy, the loss and its terms, the learning rate."""
    heads = {f"test, {head} head" if head else "test": column for head, column in run.heads.items()}
    accuracy = {**heads, "training": "train_acc"}
    losses = {"all terms": "train_loss", **run.losses}
    panels = []
    for label, columns, scale in (
        ("top-1 accuracy (%)" if run.score == "test_acc" else AGREEMENT, accuracy, "linear"),
        ("training loss, weighted (ce in nats)", losses, "linear"),
        ("learning rate", {"learning rate": "lr"}, "log"),
    ):
        lines = {name: (run, c, line_style(i)) for i, (name, c) in enumerate(columns.items()) if c in run.columns}
        if lines:
            panels.append(Panel(label, lines, scale))
    return panels


def _loss_label(term: str) -> str:
    return f"loss term {term}, weighted ({'nats' if term == 'ce' else 'no unit'})"


def curves_figure(runs: Mapping[str, Run]) -> Figure:
    """Curves of labelled runs; for a single run also its training accuracy and learning rate."""
    single = len(runs) == 1
    panels = panels_of_run(next(iter(runs.values()))) if single else panels_of_runs(runs)
    columns = {1: 1, 2: 2, 4: 2}.get(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = new_figure(5 * columns, 3.6 * rows + 0.6)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, ax in zip(panels, axes):
        for name, (run, column, look) in panel.lines.items():
            mark = "." if len(run.epochs) <= MARKED_EPOCHS else ""
            ax.plot(run.column("epoch"), run.column(column), label=name, marker=mark, **look)
        ax.set(xlabel="epoch", ylabel=panel.label, yscale=panel.scale)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.xaxis.get_major_locator().set_params(integer=True)
        if single:  # each panel has its own lines
            ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=min(len(panel.lines), 3), frameon=False)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    if not single:
        longest = max(len(name) for name in runs) + 6
        fitting = max(1, int(columns * 60 / longest))  # about twelve letters an inch
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(fitting, len(runs)), frameon=False)
    return figure


def draw_curves(runs: Mapping[str, Run], path: str | Path) -> None:
    """Write the curves of labelled runs to `path` (PNG or SVG by its suffix)."""
    curves_figure(runs).savefig(path, dpi=150)


def draw_run(folder: str | Path) -> Path | None:
    """Write a finished run's curves to `curves.png` in its folder; returns the path of the plot.

    Never raises, because a failed plot must not fail the run: it then prints one warning line and returns None.
    """
    path = Path(folder) / "curves.png"
    try:
        run = read_run(folder)
        draw_curves({run.folder.name: run}, path)
    except Exception as error:  # any error of the disk or of the plotting library
        warn(f"no {path} ({reason(error)})")
        return None
    return path
