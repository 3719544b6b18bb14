"""Tables as Markdown and CSV."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from .method_cost import method_costs
from .runs import Run
from .summary import Row, Table

COLUMNS = ("model", "top-1 last", "top-1 best", "parameters", "MACs", "seconds")
NONE = "-"


def run_row(label: str, run: Run) -> tuple[str, ...]:
    """A run's cells under `COLUMNS`: accuracies in percent, cost of its student, wall time."""
    cost = next(iter(method_costs(run.cfg)[0].values()))
    return (
        f"{label} ({run.cfg.DISTILLER.STUDENT})",
        f"{run.last:.2f}",
        f"{run.best:.2f}",
        f"{cost.parameters:,}",
        _macs(cost.macs),
        f"{run.seconds:.0f}",
    )


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths)))
        return f"| {' | '.join((first, *others))} |"

    rule = f"|{'-' * (widths[0] + 2)}|" + "|".join(f"{'-' * (w + 1)}:" for w in widths[1:]) + "|"
    return "\n".join([line(columns), rule, *map(line, rows)])


def runs_table(runs: Mapping[str, Run]) -> str:
    """Runs by their labels as a Markdown table under `COLUMNS`."""
    return markdown_table(COLUMNS, [run_row(label, run) for label, run in runs.items()])


def table_cells(table: Table, pair: str) -> tuple[list[str], list[list[str]]]:
    """Column names and formatted cells of a pair's rows; empty columns are left out."""
    columns = ["method", "runs", "top-1 last", "top-1 best", "published", *(f"over {name}" for name in table.over),
               "time", "s/epoch", "peak MiB", "parameters", "extra", "MACs"]  # fmt: skip
    rows = [_cells(row, table) for row in table.of_pair(pair)]
    kept = [i for i in range(len(columns)) if any(row[i] != NONE for row in rows)]
    return [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _cells(row: Row, table: Table) -> list[str]:
    gains = row.gains or {}
    return [
        row.method,
        str(row.runs) if row.runs == row.planned else f"{row.runs} of {row.planned}",
        _spread(row.last, row.last_sd),
        _spread(row.best, row.best_sd),
        NONE if row.published is None else f"{row.published:.2f} ({row.source})",
        *(NONE if gains.get(name) is None else f"{gains[name]:+.2f}" for name in table.over),
        _duration(row.seconds),
        NONE if row.epoch_seconds is None else f"{row.epoch_seconds:.1f}",
        NONE if row.peak_memory_mib is None else f"{row.peak_memory_mib:.0f}",
        NONE if row.parameters is None else f"{row.parameters:,}",
        NONE if row.extra_parameters is None else f"{row.extra_parameters:,}",
        NONE if row.macs is None else _macs(row.macs),
    ]


def _spread(mean: float | None, sd: float | None) -> str:
    if mean is None:
        return NONE
    return f"{mean:.2f}" if sd is None else f"{mean:.2f} ± {sd:.2f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 36000 else f"{seconds / 3600:.1f} h"


def _macs(macs: int) -> str:
    return f"{macs / 1e6:.1f} M"


def pair_heading(table: Table, pair: str) -> str:
    """The pair's name, with its teacher's published top-1."""
    return pair + (f" (teacher {table.teachers[pair]})" if pair in table.teachers else "")


def footnotes(table: Table) -> list[str]:
    """How to read the columns, the sources of the published values, and the hardware of the runs."""
    used = {row.source for row in table.rows if row.published is not None}
    used |= {source for source in table.sources if any(t.endswith(f"({source})") for t in table.teachers.values())}
    return [
        "Top-1 in percent: mean over the runs ± sample standard deviation; the best epoch is chosen on the images that "
        "it is measured on. Gains over another method are in percentage points of top-1 last. Time is the mean of the "
        "runs, s/epoch the median epoch; extra counts the parameters that the method adds while training.",
        *(f"({name}) {text}" for name, text in table.sources.items() if name in used),
        *table.measured,
    ]


def table_markdown(table: Table) -> str:
    """The whole table with its title and footnotes."""
    sections = [f"# {table.title}"] + ([table.about] if table.about else [])
    for pair in table.pairs:
        sections += [f"## {pair_heading(table, pair)}"] if pair else []
        sections.append(markdown_table(*table_cells(table, pair)))
    return "\n\n".join([*sections, *footnotes(table)]) + "\n"


def write_csv(table: Table, path: Path) -> None:
    """Write every value unrounded, a line for each row; unknown values and the deviation of a single run are empty."""
    names = ["pair", "method", "runs", "planned", "last", "last_sd", "best", "best_sd", "published", "source"]
    costs = ["seconds", "epoch_seconds", "peak_memory_mib", "parameters", "extra_parameters", "macs"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*names, *(f"over_{name}" for name in table.over), *costs, "folders"])
        for row in table.rows:
            gains = [(row.gains or {}).get(name) for name in table.over]
            cells = [*(getattr(row, n) for n in names), *gains, *(getattr(row, n) for n in costs)]
            writer.writerow(["" if cell is None else cell for cell in (*cells, ";".join(row.folders))])
