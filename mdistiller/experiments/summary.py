"""Compute the rows of a plan's table from its runs; every measured value comes from the runs' metrics.csv."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from ..errors import UserError
from .jobs import finished_run
from .method_cost import method_costs
from .plan import Plan
from .runs import Run


@dataclass(frozen=True)
class Row:
    """Results of a method (or of one of its heads) for a pair, over the seeds; None where a value is not known.

    Attributes:
        runs, planned: number of runs that are trained to their end, and of all runs.
        last, best: mean top-1 of the last and of the best epoch, in percent; `_sd` the sample standard deviation.
        published: the published top-1 in percent; `source` says whose.
        gains: mean last top-1 minus that of another method, in percentage points, by that method's name.
        seconds: mean wall time of a run; `epoch_seconds`: median wall time of an epoch, validation included.
        peak_memory_mib: the maximum over the runs.
        parameters, macs: of the deployed network; `extra_parameters`: those that the method adds while training.
        folders: the runs' folders.
    """

    pair: str
    method: str
    runs: int = 0
    planned: int = 0
    last: float | None = None
    last_sd: float | None = None
    best: float | None = None
    best_sd: float | None = None
    published: float | None = None
    source: str = ""
    gains: dict[str, float | None] | None = None
    seconds: float | None = None
    epoch_seconds: float | None = None
    peak_memory_mib: float | None = None
    parameters: int | None = None
    extra_parameters: int | None = None
    macs: int | None = None
    folders: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A plan's results.

    Attributes:
        teachers: what is published of each pair's teacher, such as "72.34 (crd)".
        measured: hardware, versions and dates of the runs, one line for each combination.
    """

    title: str
    about: str
    rows: list[Row]
    over: list[str]
    sources: dict[str, str]
    teachers: dict[str, str]
    measured: list[str]

    @property
    def pairs(self) -> list[str]:
        return list(dict.fromkeys(row.pair for row in self.rows))

    def of_pair(self, pair: str) -> list[Row]:
        """The rows of one pair."""
        return [row for row in self.rows if row.pair == pair]


def summarise(plan: Plan, opts: Sequence[str] = ()) -> Table:
    """The plan's table from the runs that are finished so far; `opts`: the command-line overrides of these runs.

    Raises:
        UserError: a folder holds a run with another configuration, or no run has ended yet.
    """
    rows: list[Row] = []
    runs: list[Run] = []
    for pair in plan.pairs:
        of_pair: list[Row] = []
        for name in plan.methods:
            jobs = plan.jobs(pair, name, opts)
            done = [run for job in jobs if (run := finished_run(job))]
            runs += done
            entry = plan.methods[name]
            line = Row(pair, name, len(done), len(jobs), published=entry.published.get(pair), source=entry.source)
            of_pair += _measured_rows(line, done) if done else [line] if jobs else []
        rows += [_with_gains(row, of_pair, plan.over) for row in of_pair]
    if not runs:
        raise UserError(f"no run of plan {plan.name} has ended yet")
    teachers = {name: f"{pair.teacher} ({pair.source})" for name, pair in plan.pairs.items() if pair.teacher}
    return Table(plan.title, plan.about, rows, plan.over, plan.sources, teachers, _hardware(runs))


def _measured_rows(line: Row, runs: Sequence[Run]) -> list[Row]:
    """A row for each head; the published value is that of the first."""
    costs, extra = method_costs(runs[0].cfg)
    rows = []
    for number, (head, column) in enumerate(runs[0].heads.items()):
        last = [run.column(column)[-1] for run in runs]
        best = [max(run.column(column)) for run in runs]
        cost = costs.get(head) or next(iter(costs.values()))
        row = replace(
            line,
            method=f"{line.method}, head: {head}" if head else line.method,
            last=fmean(last), last_sd=_sd(last), best=fmean(best), best_sd=_sd(best),
            seconds=fmean(run.seconds for run in runs),
            epoch_seconds=median(s for run in runs for s in run.column("epoch_seconds")),
            peak_memory_mib=max((m for run in runs for m in run.column("peak_memory_mib") if m == m), default=None),
            parameters=cost.parameters, extra_parameters=extra, macs=cost.macs,
            folders=tuple(str(run.folder) for run in runs),
        )  # fmt: skip
        rows.append(row if number == 0 else replace(row, published=None, source=""))
    return rows


def _sd(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def _with_gains(row: Row, of_pair: Sequence[Row], over: Sequence[str]) -> Row:
    """The row with its gains over the methods in `over`; None for the gain over itself."""
    gains: dict[str, float | None] = {}
    for name in over:
        base = next((r for r in of_pair if r.method == name or r.method.startswith(f"{name}, head: ")), None)
        known = base is not None and base is not row and row.last is not None and base.last is not None
        gains[name] = row.last - base.last if known else None  # type: ignore[operator, union-attr]
    return replace(row, gains=gains)


def _hardware(runs: Sequence[Run]) -> list[str]:
    """Hardware, versions and dates of the runs, from environment.json and the modification time of metrics.csv."""
    lines: dict[str, int] = {}
    for run in runs:
        e = run.environment
        machine = f"{e.get('gpu') or e.get('processor', 'unknown hardware')}, {e.get('threads', '?')} thread(s)"
        day = time.strftime("%Y-%m-%d", time.localtime((run.folder / "metrics.csv").stat().st_mtime))
        commit, dirty, _ = str(e.get("git_commit") or "unknown commit").partition("-dirty")
        line = f"{machine}, torch {e.get('torch', '?')}, code {commit[:14]}{dirty}, {day}"
        lines[line] = lines.get(line, 0) + 1
    return [f"{count} run(s) on {line}" for line, count in lines.items()]


def save_table(table: Table, path: Path) -> None:
    """Write the whole table as JSON."""
    path.write_text(json.dumps(asdict(table), indent=1) + "\n", encoding="utf-8")


def load_table(path: Path) -> Table:
    """Read a table that `save_table` wrote.

    Raises:
        UserError: the file does not exist or holds something else.
    """
    try:
        tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rows = [Row(**row) for row in tree.pop("rows")]
        return Table(rows=rows, **tree)
    except OSError:
        raise UserError(f"no table at {path}; tools/table.py writes one") from None
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        raise UserError(f"{path} holds no table that tools/table.py wrote") from None
