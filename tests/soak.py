#!/usr/bin/env python
"""Kill real runs of tools/train.py at random moments, many times, and check that each ends bit for bit like an
uninterrupted run. docs/reliability.md has the last result.

    python tests/soak.py --kills 200        # half an hour on one core
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.reliability.runs import METHODS, Run, differences, killed_run, launch, timed

EVERYTHING = {
    "DISTILLER.TYPE": "KD", "SOLVER.AMP": "bf16", "SOLVER.CLIP_GRAD_NORM": "1", "SOLVER.ACCUMULATE": "2",
    "SOLVER.EMA": "0.9", "SOLVER.LR_SCHEDULE": "cosine", "SOLVER.WARMUP_EPOCHS": "1", "SOLVER.TYPE": "AdamW",
    "SOLVER.LR": "0.001", "DISTILLER.TEACHER_CACHE": "cache",
}  # fmt: skip
EXPERIMENTS = METHODS | {"KD and modes": EVERYTHING}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="in all, spread evenly over the experiments")
    parser.add_argument("--only", choices=EXPERIMENTS, help="run one of the experiments, with its share of the kills")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    args = parser.parse_args()
    begun, failed = time.time(), 0
    print("| experiment | kills | runs | at a step | saving | validating | between epochs | differences |")
    print("|---|---:|---:|---:|---:|---:|---:|---|", flush=True)
    for number, (name, settings) in enumerate(EXPERIMENTS.items()):
        if args.only not in (None, name):
            continue
        kills = args.kills * (number + 1) // len(EXPERIMENTS) - args.kills * number // len(EXPERIMENTS)
        with tempfile.TemporaryDirectory() as folder:
            found, stages, runs = soak(Path(folder), settings, kills, random.Random(f"{args.seed} {name}"))
        failed += bool(found)
        where = " | ".join(str(stages[stage]) for stage in ("steps", "saving", "validation", "between epochs"))
        print(f"| {name} | {stages.total()} | {runs} | {where} | {'; '.join(found[:5]) or 'none'} |", flush=True)
    print(f"\n{(time.time() - begun) / 60:.0f} minutes")
    raise SystemExit(1 if failed else 0)


def soak(
    folder: Path, settings: dict[str, str], kills: int, moments: random.Random
) -> tuple[list[str], Counter[str], int]:
    """Kill runs until `kills` kills are made; return their differences, the stages at the kills, the number of runs."""
    whole = Run(folder / "whole", settings, launch)
    seconds = timed(whole)
    found: list[str] = []
    stages: Counter[str] = Counter()
    runs = 0
    while stages.total() < kills:
        run = Run(folder / str(runs), settings, launch)
        stages += killed_run(run, moments, min(20, kills - stages.total()), seconds / 5)
        found += differences(whole.log_path, run.log_path)
        runs += 1
    return found, stages, runs


if __name__ == "__main__":
    main()
