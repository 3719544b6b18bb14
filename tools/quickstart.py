#!/usr/bin/env python
"""Distil on scikit-learn's handwritten digits from nothing, in a few minutes on two cores.

Trains a teacher and a plain student, distils the same student with KD and with DKD, scores all four with
tools/eval.py, and ends with a table and a picture of the curves in output/quickstart. Interrupted, it goes on where
it was; delete output/digits to train anew.

    python tools/quickstart.py
"""

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mdistiller.analysis.plots.curves import draw_curves
from mdistiller.engine.build import experiment_name
from mdistiller.engine.cfg import load_cfg
from mdistiller.experiments.runs import read_run
from mdistiller.experiments.table_text import runs_table

REPOSITORY = Path(__file__).resolve().parents[1]
EXPERIMENTS = {"teacher": "teacher", "plain student": "vanilla", "student by KD": "kd", "student by DKD": "dkd"}


def tool(name: str, *arguments: str) -> None:
    """Run one of the tools as a user would, from the repository's folder."""
    print(f"\n$ python tools/{name} {' '.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, f"tools/{name}", *arguments], cwd=REPOSITORY)
    if done.returncode:
        raise SystemExit(done.returncode)


def main() -> None:
    runs = {}
    for label, config in EXPERIMENTS.items():
        path = f"configs/digits/{config}.yaml"
        cfg = load_cfg(REPOSITORY / path)
        folder = Path("output") / experiment_name(cfg)
        resume = ["--resume"] if (REPOSITORY / folder / "latest").exists() else []
        tool("train.py", "--cfg", path, *resume, "LOG.WANDB", "False")
        tool("eval.py", "-m", cfg.DISTILLER.STUDENT, "-d", "digits", "-c", f"{folder}/student_best")
        runs[label] = read_run(REPOSITORY / folder)

    out = REPOSITORY / "output" / "quickstart"
    out.mkdir(exist_ok=True)
    table = runs_table(runs)
    (out / "table.md").write_text(table + "\n", encoding="utf-8")
    draw_curves(runs, out / "curves.png")
    print(f"\nTop-1 in percent of the test images:\n\n{table}\n\nCurves: output/quickstart/curves.png")


if __name__ == "__main__":
    main()
