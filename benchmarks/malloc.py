#!/usr/bin/env python
"""Images a second with and without the memory of freed tensors kept (mdistiller/engine/runtime/malloc.py).

    python benchmarks/malloc.py
    python benchmarks/malloc.py --pairs resnet32x4-resnet8x4 --rounds 3

Every turn is a process of its own, because a process cannot return to glibc's own thresholds: the trainer's default
step of KD at batch 64, with freed memory kept and with malloc as glibc has it, in turns.

Reached with `--rounds 5` on two cores of an AMD EPYC (family 26, AVX-512), torch 2.14, CIFAR-100, 2026-11-26, nothing
else running: kept / as glibc has it, in two runs, resnet56 -> resnet20 0.98 (0.92-1.02) and 1.00 (0.98-1.00),
resnet32x4 -> resnet8x4 1.08 (1.06-1.10) and 1.08 (1.07-1.13), with 0 page faults a step in place of 35,000.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from timing import ratio, spread, take_turns

PAIRS = ("resnet56-resnet20", "resnet32x4-resnet8x4")
# Any variable that begins so makes the trainer leave malloc alone; glibc does not know this one.
AS_GLIBC_HAS_IT = {"MALLOC_UNCHANGED": "1"}


def child(pair: str, data: str, steps: int) -> None:
    """Print images a second and page faults a step, after three steps that are not counted."""
    import step  # which imports torch and the package

    data_set = step.use_data(data)
    with tempfile.TemporaryDirectory() as folder:
        teacher = step.teacher_file(pair.split("-")[0], Path(folder))
        cfg = step.settings("KD", pair, teacher, data, 64, [], ["EXPERIMENT.DEVICE", "cpu"])
        trainer = step.build_trainer(cfg)
    trainer.distiller.train()
    meters, batches = step.Meters(), iter(trainer.train_loader)

    def train(count: int) -> None:
        for _ in range(count):
            trainer.train_iter(trainer.prepare_batch(next(batches), 1), 1, meters)

    train(3)
    faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
    train(steps)
    seconds = time.perf_counter() - start
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    print(64 * steps / seconds, faults / steps, data_set)


def turn(pair: str, args: argparse.Namespace, environment: dict[str, str], faults: list[float]) -> float:
    """Images a second of a process of its own."""
    command = [sys.executable, __file__, "--child", "--pairs", pair, "--data", args.data, "--steps", str(args.steps)]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(command, env=plain | environment, capture_output=True, text=True, check=True)
    rate, fault, *_ = done.stdout.splitlines()[-1].split()
    faults.append(float(fault))
    return float(rate)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), metavar="TEACHER-STUDENT")
    parser.add_argument("--data", default="data", help="has cifar-100-python; else noise is used")
    parser.add_argument("--steps", type=int, default=8, help="steps per turn")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each way")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def compare(pair: str, args: argparse.Namespace) -> str:
    """Both ways on one pair, in turns, as a Markdown table."""
    ways: dict[str, dict[str, str]] = {"kept": {}, "as glibc has it": AS_GLIBC_HAS_IT}
    faults: dict[str, list[float]] = {name: [] for name in ways}
    reached = take_turns({name: partial(turn, pair, args, ways[name], faults[name]) for name in ways}, args.rounds)
    lines = [f"### {pair}", "", "| malloc | images/s | times glibc's | page faults a step |", "|---|---|---|---:|"]
    for name, values in reached.items():
        rate, times = spread(values), ratio(values, reached["as glibc has it"])
        lines.append(
            f"| {name} | {rate['median']:.0f} ({rate['low']:.0f}-{rate['high']:.0f}) "
            f"| {times['median']:.2f} ({times['low']:.2f}-{times['high']:.2f}) "
            f"| {spread(faults[name])['median']:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    args = parse()
    if args.child:
        child(args.pairs[0], args.data, args.steps)
        return
    for pair in args.pairs:
        print(compare(pair, args), flush=True)


if __name__ == "__main__":
    main()
