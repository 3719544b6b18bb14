"""A run, or a plan's table, as one HTML page that needs no other file and no internet connection."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..engine.cfg import cfg_text
from ..errors import UserError
from ..experiments.runs import Run, read_run
from ..experiments.summary import Table, load_table
from ..experiments.table_text import footnotes, pair_heading, table_cells
from ..user_files import reading
from .plots.bars import bars_figure
from .plots.curves import curves_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What tools/inspect_features.py draws, in the order of the page.
PICTURES = {
    "tsne": "t-SNE of the pooled features: neighbourhoods are meaningful, distances are not",
    "correlation": "Differences between student and teacher: mean logits by class, correlation of the logits",
    "confusion": "Confusion matrix",
    "reliability": "Reliability: accuracy by confidence",
    "cka": "CKA between the stages of teacher and student",
}


def report(path: Path) -> str:
    """The HTML page of a run, given by its folder, or of a table, given by its folder or its table.json.

    Raises:
        UserError: `path` is neither.
    """
    file = path if path.suffix == ".json" else path / "table.json"
    return render(_table_content(load_table(file)) if os.path.isfile(file) else _run_content(read_run(path)))


def render(content: Mapping[str, Any]) -> str:
    """The HTML page: the template html_report.html filled with `content`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    empty: dict[str, Any] = {"about": "", "facts": {}, "tables": [], "notes": [], "curves": {}, "pictures": {}}
    return environment.get_template("html_report.html").render(empty | dict(content))


def _run_content(run: Run) -> dict[str, Any]:
    cfg = run.cfg
    facts = {
        "method": cfg.DISTILLER.TYPE,
        "student": cfg.DISTILLER.STUDENT,
        "teacher": cfg.DISTILLER.TEACHER,
        "data set": cfg.DATASET.TYPE,
        "top-1 last": f"{run.last:.2f} %",
        "top-1 best": f"{run.best:.2f} %",
        "epochs": f"{run.epochs[-1]['epoch']:.0f} of {cfg.SOLVER.EPOCHS}",
        "seed": cfg.EXPERIMENT.SEED,
    }
    files = {caption: run.folder / "inspect" / f"{name}.png" for name, caption in PICTURES.items()}
    with reading(f"the plots in {run.folder / 'inspect'}", "tools/inspect_features.py draws them again"):
        pictures = {c: base64.b64encode(f.read_bytes()).decode() for c, f in files.items() if f.is_file()}
    return {
        "title": f"{cfg.EXPERIMENT.PROJECT}: {run.folder.name}",
        "facts": facts,
        "curves": {"Accuracy, loss and learning rate by epoch": _embedded(curves_figure({run.folder.name: run}))},
        "pictures": pictures,
        "runs": [_one_run(run.folder.name, run)],
    }


def _table_content(table: Table) -> dict[str, Any]:
    curves: dict[str, str] = {}
    runs: dict[str, Run] = {}
    for pair in table.pairs:
        of_pair = {row.method.split(", head: ")[0]: _first_run(row.folders) for row in table.of_pair(pair)}
        found = {name: run for name, run in of_pair.items() if run}
        runs |= {", ".join(filter(None, (name, pair))): run for name, run in found.items()}
        if found:
            seed = "Each method's first seed" + (f", {pair}" if pair else "")
            curves[seed] = _embedded(curves_figure(found))
    return {
        "title": table.title,
        "about": table.about,
        "tables": [(pair_heading(table, pair) if pair else "", *table_cells(table, pair)) for pair in table.pairs],
        "notes": footnotes(table),
        "curves": curves,
        "pictures": {"Top-1 of the last epoch by method": _embedded(bars_figure(table))},
        "runs": [_one_run(name, run) for name, run in runs.items()],
    }


def _first_run(folders: tuple[str, ...]) -> Run | None:
    """The first of a row's runs; None if it can no longer be read."""
    try:
        return read_run(folders[0])
    except (IndexError, UserError):
        return None


def _one_run(name: str, run: Run) -> dict[str, Any]:
    columns = run.columns
    return {
        "name": name,
        "configuration": cfg_text(run.cfg),
        "environment": run.environment,
        "columns": columns,
        "epochs": [[f"{row[c]:g}" if c in row else "" for c in columns] for row in run.epochs],
    }


def _embedded(figure: Figure) -> str:
    """The figure as a PNG in base64."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()
