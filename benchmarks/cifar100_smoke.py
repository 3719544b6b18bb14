#!/usr/bin/env python
"""Every method on real CIFAR-100, resnet56 -> resnet20, on one short schedule: does each train, and at what cost?

    python benchmarks/cifar100_smoke.py --jobs 2

A smoke table, not a comparison of methods: a tenth of the training set (5,000 images, the same for all), 6 epochs, one
seed, one thread a run. Needs CIFAR-100 and the published resnet56 teacher. Finished runs are not run again. The table
that it printed, with hardware and date, is in docs/results.md.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mdistiller.analysis.runs import read_run
from mdistiller.analysis.table import markdown_table
from mdistiller.engine.build import build_distiller

REPOSITORY = Path(__file__).resolve().parents[1]
OUTPUT = REPOSITORY / "output" / "cifar100_smoke"
SCHEDULE = [
    "DATASET.TRAIN_FRACTION", "0.1", "SOLVER.EPOCHS", "6", "SOLVER.LR_DECAY_STAGES", "[4,5]",
    "EXPERIMENT.PROJECT", "cifar100_smoke", "LOG.WANDB", "False",
]  # fmt: skip
# Warm-ups and K in proportion to the schedule; everything else is each method's default.
METHODS = {
    "vanilla": "DISTILLER.TYPE NONE",
    "KD": "DISTILLER.TYPE KD",
    "DKD": "DISTILLER.TYPE DKD DKD.BETA 2.0 DKD.WARMUP 2",
    "FitNet": "DISTILLER.TYPE FITNET",
    "AT": "DISTILLER.TYPE AT",
    "NST": "DISTILLER.TYPE NST",
    "PKT": "DISTILLER.TYPE PKT",
    "KDSVD": "DISTILLER.TYPE KDSVD",
    "OFD": "DISTILLER.TYPE OFD",
    "RKD": "DISTILLER.TYPE RKD",
    "VID": "DISTILLER.TYPE VID",
    "SP": "DISTILLER.TYPE SP",
    "CRD": "DISTILLER.TYPE CRD SOLVER.TRAINER crd CRD.NCE.K 4096",
    "ReviewKD": "DISTILLER.TYPE REVIEWKD REVIEWKD.WARMUP_EPOCHS 2",
    "KD, DOT": "DISTILLER.TYPE KD SOLVER.TRAINER dot",
    "DCGD_KD": "DISTILLER.TYPE DCGD_KD DCGD.GROUPS res56 KD.TEMPERATURE 20 KD.LOSS.CE_WEIGHT 0.3 KD.LOSS.KD_WEIGHT 1.0",
    "DCGD_DKD": "DISTILLER.TYPE DCGD_DKD DCGD.GROUPS res56 DKD.BETA 2.0 DKD.WARMUP 2",
}
COLUMNS = ("method", "top-1 last", "top-1 best", "s/epoch", "peak MiB", "extra parameters")


def name_of(label: str) -> str:
    return label.replace(", ", "_")


def folder_of(label: str) -> Path | None:
    """The run's folder, whose name goes on with the overrides; None before it is made."""
    return next(OUTPUT.glob(f"{name_of(label)}DATASET*"), None)


def train(label: str) -> int:
    """One run in a process of one thread, or what is missing of it; returns its exit status."""
    folder = folder_of(label)
    resume = ["--resume"] if folder and (folder / "latest").exists() else []
    command = [sys.executable, "tools/train.py", "--cfg", "configs/cifar100/short/kd.yaml", *resume, *SCHEDULE]
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with (OUTPUT / f"{name_of(label)}.log").open("a") as log:
        done = subprocess.run(
            [*command, *METHODS[label].split(), "EXPERIMENT.NAME", name_of(label)],
            cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log,
        )  # fmt: skip
    return done.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    jobs = parser.parse_args().jobs
    with ThreadPoolExecutor(jobs) as pool:
        failed = [label for label, status in zip(METHODS, pool.map(train, METHODS)) if status]
    print(markdown_table(COLUMNS, [row for label in METHODS if label not in failed for row in rows(label)]))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; see output/cifar100_smoke/*.log")


def rows(label: str) -> Iterator[tuple[str, ...]]:
    """A row for the method, and for each of its heads where there are several."""
    folder = folder_of(label)
    assert folder is not None, "a run that ended well has a folder"
    run = read_run(folder)
    extra = build_distiller(run.cfg, num_data=5000, num_classes=100).get_extra_parameters()
    cost = f"{median(run.column('epoch_seconds')):.0f}", f"{max(run.column('peak_memory_mib')):.0f}", f"{extra:,}"
    heads = [name for name in run.epochs[0] if name.startswith("test_acc_head_")] or ["test_acc"]
    for head in heads:
        name = label + head.replace("test_acc", "").replace("_head_", ", head: ")
        yield name, f"{run.column(head)[-1]:.2f}", f"{max(run.column(head)):.2f}", *cost


if __name__ == "__main__":
    main()
