#!/usr/bin/env python
"""What the teacher's cache gains, by where its rows lie: in files (host) or in the device's memory (device).

    python benchmarks/teacher_cache.py --data DATA [--fraction 0.02] [--rounds 7] [--threads 1] [--device auto]

KD of resnet56 -> resnet20 on real CIFAR-100, fp16 rows, batch 64. Three works, which alternate in one process:

    step      an epoch of training steps with all rows found, begun as the trainer does; beside it one without a cache
    look-up   the cache alone, for the same batches
    fill      an epoch's rows where none is known: `host` in the batches of the steps, `device` before them

The epoch is of `--fraction` of the images. docs/performance.md has the numbers; not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a clone, not installed

import torch
from timing import ratio, spread, take_turns

from mdistiller.engine.build import build_trainer
from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.meters import Meters
from mdistiller.engine.trainer import BaseTrainer

PLACES = ("host", "device")
REPEATS = 50  # of the look-ups of an epoch, which are short


def trainer_of(args: argparse.Namespace, *more: str) -> BaseTrainer:
    """A trainer at the beginning of epoch 1."""
    teacher, student = args.pair.split("-")
    overrides = [
        "DISTILLER.TYPE", "KD", "DISTILLER.TEACHER", teacher, "DISTILLER.STUDENT", student, "LOG.WANDB", "False",
        "DISTILLER.TEACHER_CKPT", args.teacher, "DATASET.ROOT", args.data, "EXPERIMENT.DEVICE", args.device,
        "DATASET.TRAIN_FRACTION", str(args.fraction),
    ]  # fmt: skip
    trainer = build_trainer(load_cfg(os.devnull, [*overrides, *more]))
    trainer.distiller.train()
    trainer.train_loader.set_epoch(1)
    return trainer


def epoch(trainer: BaseTrainer) -> float:
    """Milliseconds a step of epoch 1, the preparation of the cache included."""
    start, meters = _now(trainer), Meters()
    trainer.step.begin_epoch()
    for number, batch in enumerate(trainer.train_loader, start=1):
        trainer.train_iter(trainer.prepare_batch(batch, 1), 1, meters, step=number)
    return _since(trainer, start)


def look_ups(trainer: BaseTrainer) -> float:
    """Milliseconds of the cache alone, for a batch of epoch 1."""
    cache, batches = trainer.step.teacher_cache, list(trainer.train_loader)
    assert cache is not None
    start = _now(trainer)
    for image, _, index in batches * REPEATS:
        cache.look_up(index)
        with torch.no_grad():
            cache(image)
    return _since(trainer, start) / REPEATS


def fill(args: argparse.Namespace, place: str) -> float:
    """Milliseconds a batch to get all rows of epoch 1 into an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(args, "DISTILLER.TEACHER_CACHE", folder, "DISTILLER.TEACHER_CACHE_DEVICE", place)
        batches = list(trainer.train_loader)
        start, cache = _now(trainer), trainer.step.teacher_cache
        assert cache is not None
        cache.begin_epoch()
        for image, _, index in batches:
            cache.look_up(index)
            with torch.no_grad():
                cache(image)
        return _since(trainer, start)


def _now(trainer: BaseTrainer) -> float:
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    return time.perf_counter()


def _since(trainer: BaseTrainer, start: float) -> float:
    """Milliseconds a step of an epoch since `start`."""
    return 1000 * (_now(trainer) - start) / len(trainer.train_loader)


def measure(args: argparse.Namespace) -> str:
    """All measurements, as a table."""
    with tempfile.TemporaryDirectory() as folder:
        own = partial(trainer_of, args, "DISTILLER.TEACHER_CACHE", folder, "DISTILLER.TEACHER_CACHE_DEVICE")
        trainers = {place: own(place) for place in PLACES}
        works = {"step, no cache": partial(epoch, trainer_of(args))}
        works |= {f"step, {place}": partial(epoch, trainer) for place, trainer in trainers.items()}
        works |= {f"look-up, {place}": partial(look_ups, trainer) for place, trainer in trainers.items()}
        take_turns(works, 1)  # which fills the files
        works |= {f"fill, {place}": partial(fill, args, place) for place in PLACES}
        reached = take_turns(works, args.rounds)
    lines = ["| work | where | ms a batch | times host |", "|---|---|---|---|"]
    for name, values in reached.items():
        work, place = name.split(", ")
        times = ratio(reached[f"{work}, host"], values)
        lines.append(f"| {work} | {place} | {_shown(spread(values))} | {_shown(times)} |")
    return "\n".join(lines)


def _shown(s: dict[str, float]) -> str:
    return f"{s['median']:.3g} ({s['low']:.3g}-{s['high']:.3g})"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="has cifar-100-python")
    parser.add_argument("--pair", default="resnet56-resnet20", metavar="TEACHER-STUDENT")
    parser.add_argument("--teacher", default="", help="the teacher's checkpoint; by default the published one")
    parser.add_argument("--fraction", type=float, default=0.02, help="of the training images")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each work")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="auto")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    print(measure(args))


if __name__ == "__main__":
    main()
