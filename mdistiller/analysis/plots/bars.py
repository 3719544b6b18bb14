"""A plan's table as a bar chart."""

from __future__ import annotations

from math import floor
from pathlib import Path
from typing import TYPE_CHECKING

from ...experiments.summary import Row, Table
from ...experiments.table_text import pair_heading
from ...figures import new_figure
from .style import COLOURS, GREY

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def bars_figure(table: Table) -> Figure:
    """Top-1 of the last epoch by method, with the standard deviation and the published value; a panel for each pair.

    The axes do not start at zero; their labels say so. Methods that gains are computed over are grey.
    """
    measured = {pair: [row for row in table.of_pair(pair) if row.last is not None] for pair in table.pairs}
    measured = {pair: rows for pair, rows in measured.items() if rows}
    columns = min(len(measured), 3)
    lines = -(-len(measured) // columns)
    most = max(map(len, measured.values()))
    figure = new_figure(7 if columns == 1 else 5.5 * columns, lines * (1.4 + 0.32 * most))
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax, (pair, rows) in zip(axes, measured.items()):
        places = range(len(rows))
        means = [row.last or 0.0 for row in rows]
        spreads = [row.last_sd or 0.0 for row in rows]
        published = [(y, row.published) for y, row in zip(places, rows) if row.published is not None]
        colours = [GREY if row.method in table.over else COLOURS[0] for row in rows]
        ax.barh(places, means, xerr=spreads, color=colours, capsize=3, height=0.7, error_kw={"elinewidth": 1.2})
        if published:
            ys, xs = zip(*published)
            ax.plot(xs, ys, "D", color=COLOURS[1], markersize=6, label="published")
            ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
        low, high = _range(rows)
        for y, mean, spread in zip(places, means, spreads):
            ax.annotate(f"{mean:.2f}", (mean + spread, y), (4, 0), textcoords="offset points", va="center", fontsize=8)
        ax.set_yticks(places, [row.method for row in rows])
        ax.set_xlim(low, high + 0.12 * (high - low))
        ax.invert_yaxis()
        ax.spines[["top", "right"]].set_visible(False)
        error = ", mean ± standard deviation" if any(spreads) else ""
        ax.set_xlabel(f"top-1 of the last epoch (%){error}\nthe axis starts at {low:g}")
        if pair:
            ax.set_title(pair_heading(table, pair), fontsize=10)
    for ax in axes[len(measured) :]:
        ax.set_visible(False)
    return figure


def _range(rows: list[Row]) -> tuple[float, float]:
    """A whole number somewhat below the lowest value, and the highest value."""
    low = min(min(r.last - (r.last_sd or 0), r.published or 100) for r in rows if r.last is not None)
    high = max(max(r.last + (r.last_sd or 0), r.published or 0) for r in rows if r.last is not None)
    return max(0.0, floor(low - 0.15 * (high - low) - 0.2)), high


def draw_bars(table: Table, path: Path) -> None:
    """Write the table's bar chart to `path` (PNG or SVG by its suffix)."""
    bars_figure(table).savefig(path, dpi=110)
