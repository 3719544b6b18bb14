#!/usr/bin/env python
"""Kill real runs at random moments, many times, and check that each ends bit for bit like an uninterrupted run.

    python tests/soak.py --kills 200          # four experiments of tools/train.py: half an hour on one core
    python tests/soak.py --combinations 100   # 100 random combinations of the modes in docs/modes.md: an hour

Combinations run on tiny networks and images, under torchrun where they have two ranks, with loader workers or without,
and get SIGKILL or a SIGTERM to the whole process group. Each result is added to output/soak.jsonl (or
--log); the same command goes on after the last one. docs/reliability.md has the last results.
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
from tests.reliability.soaking import soak_combinations, table

EVERYTHING = {
    "DISTILLER.TYPE": "KD", "SOLVER.AMP": "bf16", "SOLVER.CLIP_GRAD_NORM": "1", "SOLVER.ACCUMULATE": "2",
    "SOLVER.EMA": "0.9", "SOLVER.LR_SCHEDULE": "cosine", "SOLVER.WARMUP_EPOCHS": "1", "SOLVER.TYPE": "AdamW",
    "SOLVER.LR": "0.001", "DISTILLER.TEACHER_CACHE": "cache",
}  # fmt: skip
EXPERIMENTS = METHODS | {"KD and modes": EVERYTHING}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0, help="in all, spread evenly over the experiments")
    parser.add_argument("--combinations", type=int, default=0, help="how many combinations of modes")
    parser.add_argument("--only", choices=EXPERIMENTS, help="run one of the experiments, with its share of the kills")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments and combinations")
    parser.add_argument("--log", type=Path, default=Path("output/soak.jsonl"), help="the combinations' results")
    args = parser.parse_args()
    if not (args.kills or args.combinations):
        parser.error("name how many: --kills 200 and --combinations 100")
    begun, failed = time.time(), 0
    if args.kills:
        failed += soak_experiments(args.kills, args.only, args.seed)
    if args.combinations:
        results = soak_combinations(args.combinations, args.seed, args.log)
        print("", *table(results), sep="\n")
        failed += sum(bool(result.found) for result in results)
    print(f"\n{(time.time() - begun) / 60:.0f} minutes")
    raise SystemExit(1 if failed else 0)


def soak_experiments(kills: int, only: str | None, seed: int) -> int:
    """Kill runs of the experiments, or of the one called `only`; print a table, and return how many differ."""
    failed = 0
    print("| experiment | kills | runs | at a step | saving | validating | between epochs | differences |")
    print("|---|---:|---:|---:|---:|---:|---:|---|", flush=True)
    for number, (name, settings) in enumerate(EXPERIMENTS.items()):
        if only not in (None, name):
            continue
        share = kills * (number + 1) // len(EXPERIMENTS) - kills * number // len(EXPERIMENTS)
        with tempfile.TemporaryDirectory() as folder:
            found, stages, runs = soak(Path(folder), settings, share, random.Random(f"{seed} {name}"))
        failed += bool(found)
        where = " | ".join(str(stages[stage]) for stage in ("steps", "saving", "validation", "between epochs"))
        print(f"| {name} | {stages.total()} | {runs} | {where} | {'; '.join(found[:5]) or 'none'} |", flush=True)
    return failed


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
