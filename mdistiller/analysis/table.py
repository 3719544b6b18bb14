"""Runs side by side, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..dataset import dataset_info
from ..engine.build import model_dict
from ..engine.cost import network_cost
from ..models import build_model
from .runs import Run

COLUMNS = ("model", "top-1 last", "top-1 best", "parameters", "MACs", "seconds")


def run_row(label: str, run: Run) -> tuple[str, ...]:
    """A run's cells under `COLUMNS`: accuracies in percent, cost of its student, wall time."""
    info = dataset_info[run.cfg.DATASET.TYPE]
    student = build_model(model_dict(run.cfg.DATASET.TYPE), run.cfg.DISTILLER.STUDENT, info.num_classes)
    cost = network_cost(student, info.image_size)
    return (
        f"{label} ({run.cfg.DISTILLER.STUDENT})",
        f"{run.last:.2f}",
        f"{run.best:.2f}",
        f"{cost.parameters:,}",
        f"{cost.macs / 1e6:.1f} M",
        f"{run.seconds:.0f}",
    )


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths)))
        return f"| {' | '.join((first, *others))} |"

    rule = f"|{'-' * (widths[0] + 2)}|" + "|".join(f"{'-' * (w + 1)}:" for w in widths[1:]) + "|"
    return "\n".join([line(columns), rule, *map(line, rows)])


def runs_table(runs: Mapping[str, Run]) -> str:
    """Runs by their labels as a Markdown table under `COLUMNS`."""
    return markdown_table(COLUMNS, [run_row(label, run) for label, run in runs.items()])
