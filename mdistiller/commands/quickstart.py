"""Distil on scikit-learn's handwritten digits, with nothing to download, in a few minutes on two cores.

    mdistiller quickstart

Trains a teacher and a plain student, distils the same student by KD and by DKD, scores all four with `mdistiller eval`,
and ends with a table and a plot of the curves in output/quickstart. After an interruption, the same command
continues where it stopped; delete output/digits to train from the start.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ..analysis.plots.curves import draw_curves
from ..console import tool
from ..engine.cfg import load_cfg
from ..engine.run_name import experiment_name
from ..experiments.processes import package_environment
from ..experiments.runs import read_run
from ..experiments.table_text import runs_table
from ..user_files import writing
from ._arguments import command_parser

EXPERIMENTS = {"teacher": "teacher", "plain student": "vanilla", "student by KD": "kd", "student by DKD": "dkd"}


def command(*arguments: str) -> None:
    """Run a command as a user would type it, and exit with its status if it fails."""
    print(f"\n$ mdistiller {' '.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "mdistiller", *arguments], env=os.environ | package_environment())
    if done.returncode:
        raise SystemExit(done.returncode)


@tool()
def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    command_parser(__doc__, prog).parse_args(arguments)
    runs = {}
    for label, config in EXPERIMENTS.items():
        path = f"configs/digits/{config}.yaml"
        cfg = load_cfg(path)
        folder = Path("output") / experiment_name(cfg)
        resume = ["--resume"] if (folder / "latest").exists() else []
        command("train", "--cfg", path, *resume, "LOG.WANDB", "False")
        command("eval", "-m", cfg.DISTILLER.STUDENT, "-d", "digits", "-c", f"{folder}/student_best")
        runs[label] = read_run(folder)

    table, text, curves = runs_table(runs), Path("output/quickstart/table.md"), Path("output/quickstart/curves.png")
    with writing(text):
        text.write_text(table + "\n", encoding="utf-8")
        draw_curves(runs, curves)
    print(f"\nTop-1 in percent of the test images:\n\n{table}\n\nCurves: {curves}")
