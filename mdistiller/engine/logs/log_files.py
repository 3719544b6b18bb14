"""worklog.txt and metrics.csv: one block and one row per epoch.

Resuming removes the entries of epochs that will run again, and incomplete entries that a kill has left, so that a run
ends with the same files whether it was stopped or not. What a full disk refuses is written with the next epoch.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from ..files.atomic import write_whole

Metrics = Mapping[str, float]


class LogFile:
    """A text file to append to; at first it holds the text `kept`."""

    def __init__(self, path: Path, kept: str) -> None:
        self.path = path
        self._pending = ""
        if kept:
            self.rewrite(kept)
        else:
            self.path.unlink(missing_ok=True)
            self._whole = 0

    def rewrite(self, text: str) -> None:
        """Replace the content of the file by `text`, and drop text that is still to be written."""
        data = text.encode()
        write_whole(data, self.path)
        self._whole, self._pending = len(data), ""

    def append(self, text: str) -> None:
        """Append `text`, after any text that could not be written before.

        Raises:
            OSError: it cannot be written now; the next call tries again.
        """
        torn, self._pending = bool(self._pending), self._pending + text
        with self.path.open("ab") as file:
            size = file.seek(0, os.SEEK_END)
            if torn:
                size = file.truncate(min(size, self._whole))
            self._whole = size
            file.write(self._pending.encode())
            file.flush()
            os.fsync(file.fileno())
        self._pending = ""


class Worklog:
    """worklog.txt in the original's form: a block of `name: value` lines per epoch."""

    tries_again = True
    shown = (
        "train_acc", "train_loss", "test_acc", "test_acc_top5", "test_loss",
        "test_agreement", "test_agreement_top5", "test_kl",
    )  # fmt: skip
    prefixes = ("test_acc_head_", "test_agreement_head_", "method/")
    rule = "-" * 25
    # Whole lines that a trainer's own `log` has written after a block: neither the next block, nor what `finish` wrote.
    foreign = rf"(?:(?!{rule}\n|(?:best|last)_(?:acc|agreement)\S*\t)[^\x00-\x08\x0a-\x1f\ufffd]*\n)*"
    block = re.compile(rf"^{rule}\nepoch: (-?\d+)\n(?:.*\n)*?{rule}\n{foreign}", re.MULTILINE)

    def __init__(self, folder: Path, start_epoch: int) -> None:
        path = folder / "worklog.txt"
        text, end = _read(path), 0
        for block in self.block.finditer(text):
            if int(block[1]) >= start_epoch:
                break
            end = block.end()
        self.file = LogFile(path, text[:end])

    def epoch(self, epoch: int, metrics: Metrics) -> None:
        # The original prints the learning rate with two decimals, so that 0.0005 becomes 0.00.
        lines = [f"epoch: {epoch}", f"lr: {metrics['lr']:g}"]
        lines += [f"{name}: {metrics[name]:.2f}" for name in self.shown if name in metrics]
        lines += [f"{name}: {value:.2f}" for name, value in metrics.items() if name.startswith(self.prefixes)]
        self.file.append("\n".join([self.rule, *lines, self.rule, ""]))

    def step(self, step: int, scalars: Metrics) -> None:
        pass

    def finish(self, summary: Metrics) -> None:
        self.file.append("".join(f"{name}\t{value:.2f}\n" for name, value in summary.items()))


class MetricsCsv:
    """metrics.csv: one row per epoch, one column per metric. A metric that first appears later gets a new column."""

    tries_again = True

    def __init__(self, folder: Path, start_epoch: int) -> None:
        path = folder / "metrics.csv"
        self.rows = [row for row in _whole_rows(_read(path)) if int(row["epoch"]) < start_epoch]
        self.columns = list(self.rows[0]) if self.rows else []
        self.file = LogFile(path, _csv(self.columns, self.rows, header=True) if self.rows else "")

    def epoch(self, epoch: int, metrics: Metrics) -> None:
        row = {"epoch": str(epoch), **{name: f"{value:.6g}" for name, value in metrics.items()}}
        self.rows.append(row)
        new = [name for name in row if name not in self.columns]
        self.columns += new
        if new:
            self.file.rewrite(_csv(self.columns, self.rows, header=True))
        else:
            self.file.append(_csv(self.columns, [row]))

    def step(self, step: int, scalars: Metrics) -> None:
        pass

    def finish(self, summary: Metrics) -> None:
        pass


def _read(path: Path) -> str:
    """The text of the file `path` with its line ends unchanged; "" if there is no file."""
    try:
        return path.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return ""


def _whole_rows(text: str) -> Iterator[dict[str, str]]:
    """The rows that have as many cells as the header, and an epoch number."""
    first, *lines = text.split("\n")[:-1] or [""]
    columns = _cells(first)
    for line in lines:
        row = dict(zip(columns, _cells(line)))
        if row.get("epoch", "").removeprefix("-").isdecimal() and len(row) == len(columns) == len(_cells(line)):
            yield row


def _cells(line: str) -> list[str]:
    try:
        return next(csv.reader([line]), [])
    except csv.Error:
        return []


def _csv(columns: list[str], rows: list[dict[str, str]], header: bool = False) -> str:
    text = StringIO(newline="")
    writer: Any = csv.DictWriter(text, columns, restval="")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
