#!/usr/bin/env python
"""Images a second and peak memory of the whole training step, data included, against a classic path and the floor.

    python benchmarks/step.py
    python benchmarks/step.py --pairs resnet56-resnet20 --methods KD DKD --modes default bf16 --threads 2 --json

KD and DKD run on every pair, the other methods on the first. The classic path (classic.py), this trainer's default and
its opt-in modes alternate in one process. Results are medians, lowest and highest; ratios to the classic path are taken
turn by turn. Every turn of this trainer repeats the same epoch, so that `teacher cache` has only hits, its best case.
A first turn, which compiles and fills caches, is not counted.

The floor is the time that the multiply-accumulates alone would take (see floor.py). Peak memory is that of the tensors
of one step beyond what is held between steps: on the CPU from the allocator's record of this process (without the
workers of the classic loader), on a GPU from torch's.

Measured with `--methods KD DKD --threads 2 --steps 6 --rounds 5` on two cores of an AMD EPYC (family 26, bfloat16
units) with torch 2.14, 2026-11-26. Images a second as multiples of the classic path's: resnet56 -> resnet20 default
1.42 (KD) and 1.41 (DKD), bf16 2.04 and 2.05; resnet32x4 -> resnet8x4 default 1.35 and 1.39, bf16 2.56 and 2.64.
docs/performance.md has the spread and the other methods. No GPU was available.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a clone, not installed
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no message of the profiler that there is no GPU,
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # nor about memory allocated before it started

import torch
import torch.nn as nn
from classic import ClassicTrainer, cifar_loader
from floor import bfloat16_units, convolution_rate, floor_rate
from timing import ratio, spread, take_turns
from torch.profiler import ProfilerActivity, profile
from yacs.config import CfgNode as CN

from mdistiller.dataset import ImageArray, dataset_dict
from mdistiller.dataset.cifar100 import MEAN, STD
from mdistiller.distillers import RunFacts, distiller_dict
from mdistiller.engine.build import build_distiller, build_trainer
from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.meters import Meters
from mdistiller.engine.runtime.device import pick_device
from mdistiller.engine.runtime.environment import describe_run
from mdistiller.engine.runtime.malloc import keep_freed_memory
from mdistiller.engine.runtime.seeds import seed_everything
from mdistiller.errors import UserError
from mdistiller.models import build_model, cifar_model_dict, teacher_checkpoint

REPOSITORY = Path(__file__).resolve().parents[1]
PAIRS = ("resnet56-resnet20", "resnet32x4-resnet8x4")
ON_EVERY_PAIR = ("KD", "DKD")

# What each mode sets beyond the defaults; {folder} stands for an empty temporary folder.
MODES: dict[str, list[str]] = {
    "default": [],
    "bf16": ["SOLVER.AMP", "bf16"],
    "bf16 teacher": ["SOLVER.AMP", "bf16-teacher"],
    "compile": ["SOLVER.COMPILE", "True"],
    "bf16, compile": ["SOLVER.AMP", "bf16", "SOLVER.COMPILE", "True"],
    "teacher cache": ["DISTILLER.TEACHER_CACHE", "{folder}"],
    "bf16, teacher cache": ["SOLVER.AMP", "bf16", "DISTILLER.TEACHER_CACHE", "{folder}"],
    "teacher cache in memory": ["DISTILLER.TEACHER_CACHE_DEVICE", "device"],
    "bf16, teacher cache in memory": ["SOLVER.AMP", "bf16", "DISTILLER.TEACHER_CACHE_DEVICE", "device"],
}
# What a method needs beyond its defaults.
METHOD_SETTINGS = {
    "CRD": ["SOLVER.TRAINER", "crd"],
    **{name: ["DCGD.GROUPS", "res56"] for name in distiller_dict if name.startswith("DCGD")},
}
# Goals on two cores, as ratios to the classic path.
GOALS = {("resnet56-resnet20", "default"): 1.4, ("resnet32x4-resnet8x4", "default"): 1.25}
GOALS |= {(pair, "bf16"): 2.0 for pair in PAIRS}


@dataclass
class Runner:
    """One path, ready to train; each turn goes over the same batches."""

    batches: Callable[[], Iterator[Any]]
    train: Callable[[Any], None]
    device: torch.device
    # Whether malloc keeps freed memory, as in this trainer, or returns it, as glibc does for the classic path.
    keeps_memory: bool

    def images_per_second(self, steps: int) -> float:
        """Images a second over `steps` steps, after one that fills the caches and starts the workers."""
        keep_freed_memory(self.keeps_memory)
        batches = self.batches()
        self.train(next(batches))
        self._wait()
        start, images = time.perf_counter(), 0
        for batch in islice(batches, steps):
            self.train(batch)
            images += len(batch[1])
        self._wait()
        reached = images / (time.perf_counter() - start)
        del batches  # which also ends the workers
        return reached

    def peak_mebibytes(self) -> float:
        """Peak memory of one step, beyond what is held before it."""
        batches = self.batches()
        self.train(next(batches))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.train(next(batches))
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            self.train(next(batches))
        held = peak = 0
        events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return peak / 2**20

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def settings(method: str, pair: str, teacher: str, root: str, batch: int, mode: list[str], more: list[str]) -> CN:
    """The configuration of a run: nothing but defaults, the pair, the method and the mode."""
    teacher_name, student = pair.split("-")
    overrides = [
        "DISTILLER.TYPE", method, "DISTILLER.TEACHER", teacher_name, "DISTILLER.TEACHER_CKPT", teacher,
        "DISTILLER.STUDENT", student, "DATASET.ROOT", root, "SOLVER.BATCH_SIZE", str(batch), "LOG.WANDB", "False",
    ]  # fmt: skip
    return load_cfg(os.devnull, [*overrides, *METHOD_SETTINGS.get(method, []), *mode, *more])


def ours(cfg: CN) -> Runner:
    """This trainer, driven through its own step."""
    trainer = build_trainer(cfg)
    trainer.distiller.train()
    meters = Meters()
    loader = trainer.train_loader
    loader.set_epoch(1)
    return Runner(
        batches=lambda: iter(loader),
        # The first steps of an epoch also check every weight of the frozen networks.
        train=lambda batch: trainer.train_iter(trainer.prepare_batch(batch, 1), 1, meters, step=3),
        device=trainer.device,
        keeps_memory=True,
    )


def classic(cfg: CN, workers: int) -> Runner:
    """The classic path around the same networks and the same loss."""
    data = dataset_dict[cfg.DATASET.TYPE].read(Path(cfg.DATASET.ROOT).expanduser(), True)
    trainer = classic_trainer(cfg, len(data.targets))
    negatives = cfg.CRD.NCE.K if "contrastive_index" in trainer.distiller.needs_batch else 0
    loader = cifar_loader(data, cfg.SOLVER.BATCH_SIZE, workers, negatives)
    return Runner(lambda: iter(loader), lambda batch: trainer.train_iter(batch, 1), trainer.device, False)


def classic_trainer(cfg: CN, num_data: int) -> ClassicTrainer:
    """From the same seed as `ours`, so with the same weights."""
    seed_everything(cfg.EXPERIMENT.SEED)
    distiller = build_distiller(cfg, replace(RunFacts.of(cfg), num_data=num_data))
    solver = cfg.SOLVER
    device = pick_device(cfg.EXPERIMENT.DEVICE)
    return ClassicTrainer(distiller, solver.LR, solver.MOMENTUM, solver.WEIGHT_DECAY, device)


def use_data(root: str) -> str:
    """If CIFAR-100 is not in `root`, use noise of its size instead; return a description of the data."""
    if (Path(root).expanduser() / "cifar-100-python" / "train").is_file():
        return f"CIFAR-100 in {root}"

    @cache
    def noise(root: Path, train: bool, skip_broken: bool = False) -> ImageArray:
        count = 50_000 if train else 10_000
        images = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8)
        return ImageArray(images, torch.arange(count) % 100, MEAN, STD)

    dataset_dict["cifar100"] = replace(dataset_dict["cifar100"], read=noise)
    return f"noise of CIFAR-100's size, which is not in {root}"


def teacher_file(name: str, folder: Path) -> str:
    """The published teacher's checkpoint, or if it is missing, one of an untrained network.

    The untrained network has BatchNorm statistics of random images, so that its outputs have a trained one's scale.
    """
    with suppress(UserError):
        return str(teacher_checkpoint(cifar_model_dict[name][1], name))
    path = folder / f"{name}.pth"
    if not path.exists():
        torch.manual_seed(0)
        teacher = build_model(cifar_model_dict, name, 100).train()
        for layer in teacher.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = None  # the plain mean over batches
        with torch.no_grad():
            for _ in range(3):
                teacher(torch.randn(32, 3, 32, 32))
        torch.save({"model": teacher.state_dict()}, path)
    return str(path)


def race(
    method: str, pair: str, modes: list[str], args: argparse.Namespace, rates: dict[str, float], folder: Path
) -> dict[str, Any]:
    """One method on one pair: the classic path against the modes; a mode that the method refuses, with the reason."""
    teacher, student = pair.split("-")
    config = partial(settings, method, pair, teacher_file(teacher, folder), args.data, args.batch)
    more = ["EXPERIMENT.DEVICE", args.device]
    runners, refused = {"classic": classic(config([], more), args.workers)}, {}
    for mode in modes:
        own = tempfile.mkdtemp(dir=folder)
        try:
            runners[mode] = ours(config([value.format(folder=own) for value in MODES[mode]], more))
        except UserError as error:
            refused[mode] = str(error)
    works = {name: partial(runner.images_per_second, args.steps) for name, runner in runners.items()}
    take_turns(works, 1)  # compiles, fills the teacher cache
    reached = take_turns(works, args.rounds)
    result: dict[str, Any] = {}
    for name, values in reached.items():
        rate = rates["bfloat16" if "bf16" in name else "float32"]
        best = floor_rate(teacher, student, rate, distiller_dict[method].needs_teacher)
        result[name] = {
            "images_per_second": spread(values),
            "ratio": ratio(values, reached["classic"]),
            "peak_mib": runners[name].peak_mebibytes(),
            "floor_images_per_second": best,
            "times_floor": best / spread(values)["median"],
        }
    return {"modes": result, "refused": refused}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All measurements, as --json prints them."""
    device = pick_device(args.device)
    result: dict[str, Any] = {
        "machine": describe_run(str(device)), "device": str(device), "bfloat16_units": bfloat16_units(device),
        "data": use_data(args.data), "batch": args.batch, "steps": args.steps, "rounds": args.rounds,
        "workers": args.workers, "races": [],
    }  # fmt: skip
    rates = {name: convolution_rate(getattr(torch, name), device) for name in ("float32", "bfloat16")}
    result["best_gmacs_per_second"] = {name: rate / 1e9 for name, rate in rates.items()}
    with tempfile.TemporaryDirectory() as folder:
        for place, pair in enumerate(args.pairs):
            for method in args.methods if place == 0 else [m for m in args.methods if m in ON_EVERY_PAIR]:
                if not args.json:
                    print(f"{method}, {pair} ...", file=sys.stderr, flush=True)
                raced = race(method, pair, args.modes, args, rates, Path(folder))
                result["races"].append({"method": method, "pair": pair, **raced})
    return result


def table(result: dict[str, Any]) -> str:
    """The measurements as Markdown, one table per pair."""
    rates, machine = result["best_gmacs_per_second"], result["machine"]
    lines = [
        f"{machine['gpu'] if result['device'] != 'cpu' else machine['processor']}, {machine['threads']} threads, torch "
        f"{machine['torch']}; {result['data']}; batch {result['batch']}; {result['rounds']} turns of "
        f"{result['steps']} steps",
        f"best convolution: {rates['float32']:.0f} GMAC/s in float32, {rates['bfloat16']:.0f} in bfloat16"
        + ("" if result["bfloat16_units"] else " (no bfloat16 units: bfloat16 is emulated)"),
    ]
    for pair in dict.fromkeys(r["pair"] for r in result["races"]):
        lines += ["", f"### {pair}", "", "| method | mode | images/s | times classic | goal | peak MiB | times floor |"]
        lines.append("|---|---|---|---|---|---|---|")
        for race_ in (r for r in result["races"] if r["pair"] == pair):
            for mode, r in race_["modes"].items():
                goal = GOALS.get((pair, mode), "") if race_["method"] in ON_EVERY_PAIR else ""
                lines.append(
                    f"| {race_['method']} | {mode} | {_show(r['images_per_second'], 0)} | {_show(r['ratio'], 2)} "
                    f"| {goal} | {r['peak_mib']:.0f} | {r['times_floor']:.2f} |"
                )
            for mode, why in race_["refused"].items():
                lines.append(f"| {race_['method']} | {mode} | refused: {why} | | | | |")
    return "\n".join(lines)


def _show(s: dict[str, float], digits: int) -> str:
    return f"{s['median']:.{digits}f} ({s['low']:.{digits}f}-{s['high']:.{digits}f})"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), metavar="TEACHER-STUDENT")
    others = [name for name in distiller_dict if name not in (*ON_EVERY_PAIR, "DCGD")]
    parser.add_argument("--methods", nargs="+", default=[*ON_EVERY_PAIR, *others], choices=[*distiller_dict])
    parser.add_argument("--modes", nargs="+", default=["default", "bf16"], choices=[*MODES])
    parser.add_argument("--data", default=str(REPOSITORY / "data"), help="has cifar-100-python; else noise is used")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="steps per turn")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each path")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of the classic path's DataLoader")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the tables")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    result = measure(args)
    print(json.dumps(result, indent=2) if args.json else table(result))


if __name__ == "__main__":
    main()
