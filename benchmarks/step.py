#!/usr/bin/env python
"""Images a second and peak memory of the whole training step, data included, against a classic path and the floor.

    python benchmarks/step.py
    python benchmarks/step.py --pairs resnet56-resnet20 --methods KD DKD --modes default bf16 --threads 2 --json
    python benchmarks/step.py --without-classic --modes eager graph "bf16, graph" --out step.json      # on a GPU

KD and DKD run on every pair, the other methods on the first. The classic path (classic.py), this trainer's default and
its opt-in modes alternate in one process. Results are medians, lowest and highest; ratios to the classic path are taken
turn by turn. Every turn of this trainer repeats the same epoch, so that `teacher cache` has only hits, its best case.
A first turn, which compiles and fills caches, is not counted. Each race is printed, and written to --out, once it is
over; a mode that fails is a line of its table, and the others go on.

A mode's name says whether the step is a CUDA graph: with `eager` never, with `graph` always, else by the default of
SOLVER.CUDA_GRAPH. The floor is the time that the multiply-accumulates alone would take (see floor.py). Peak memory is
that of the tensors of one step beyond what is held between steps: on the CPU from the record of the allocator
(without the workers of the classic loader), on a GPU from torch's, without a CUDA graph's own memory. That is in the
memory held, as are data and networks. Launches, kernels and waits of the host (synchronisations) are counted by torch's
profiler; on a CPU it counts operations.

Measured with `--methods KD DKD --threads 2 --steps 6 --rounds 5` on two cores of an AMD EPYC (family 26, bfloat16
units) with torch 2.14, 2026-11-26. Images a second as multiples of the classic path's: resnet56 -> resnet20 default
1.42 (KD) and 1.41 (DKD), bf16 2.04 and 2.05; resnet32x4 -> resnet8x4 default 1.35 and 1.39, bf16 2.56 and 2.64.
docs/performance.md has the spread, the other methods, and an H200.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a clone, not installed
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no message of the profiler that there is no GPU,
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # nor about memory allocated before it started

import torch
from classic import ClassicTrainer, cifar_loader
from floor import bfloat16_units, convolution_rate, floor_rate
from runner import Runner
from step_table import ON_EVERY_PAIR, head, pair_head, rows
from timing import ratio, spread, take_turns
from untrained import untrained
from yacs.config import CfgNode as CN

from mdistiller.console import reason, tool
from mdistiller.dataset import ImageArray, dataset_dict
from mdistiller.dataset.cifar100 import MEAN, STD
from mdistiller.distillers import RunFacts, distiller_dict
from mdistiller.engine.build import build_distiller, build_trainer
from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.files.atomic import write_whole
from mdistiller.engine.meters import Meters
from mdistiller.engine.runtime.device import pick_device
from mdistiller.engine.runtime.environment import describe_run
from mdistiller.engine.runtime.seeds import seed_everything
from mdistiller.errors import UserError
from mdistiller.models import cifar_model_dict, teacher_checkpoint

REPOSITORY = Path(__file__).resolve().parents[1]
PAIRS = ("resnet56-resnet20", "resnet32x4-resnet8x4")

COMPILE, BF16 = ["SOLVER.COMPILE", "True"], ["SOLVER.AMP", "bf16"]
CACHE, MEMORY = ["DISTILLER.TEACHER_CACHE", "{folder}"], ["DISTILLER.TEACHER_CACHE_DEVICE", "device"]
# What each mode sets beyond the defaults; {folder} stands for an empty temporary folder.
_EAGER_OR_NOT: dict[str, list[str]] = {
    "": [],
    "bf16": BF16,
    "fp16": ["SOLVER.AMP", "fp16"],
    "bf16 teacher": ["SOLVER.AMP", "bf16-teacher"],
    "NCHW": ["SOLVER.CHANNELS_LAST", "False"],
    "compile": COMPILE,
    "bf16, compile": [*BF16, *COMPILE],
    "teacher cache": CACHE,
    "bf16, teacher cache": [*BF16, *CACHE],
    "teacher cache in memory": MEMORY,
    "bf16, teacher cache in memory": [*BF16, *MEMORY],
    "bf16, compile, teacher cache in memory": [*BF16, *COMPILE, *MEMORY],
}
GRAPH = ["SOLVER.CUDA_GRAPH", "always"]
_GRAPHS = {"": [], "eager": ["SOLVER.CUDA_GRAPH", "never"], "graph": GRAPH}
MODES = {
    ", ".join(filter(None, (name, graph))) or "default": [*own, *_GRAPHS[graph]]
    for graph in _GRAPHS
    for name, own in _EAGER_OR_NOT.items()
}
# What a method needs beyond its defaults.
METHOD_SETTINGS = {
    "CRD": ["SOLVER.TRAINER", "crd"],
    **{name: ["DCGD.GROUPS", "res56"] for name in distiller_dict if name.startswith("DCGD")},
}

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
    """CIFAR-100, read once for all runners; noise of its size if it is not in `root`. Returns in words what it is."""
    if (Path(root).expanduser() / "cifar-100-python" / "train").is_file():
        dataset_dict["cifar100"] = replace(dataset_dict["cifar100"], read=cache(dataset_dict["cifar100"].read))
        return f"CIFAR-100 in {root}"

    @cache
    def noise(root: Path, train: bool, skip_broken: bool = False) -> ImageArray:
        count = 50_000 if train else 10_000
        images = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8)
        return ImageArray(images, torch.arange(count) % 100, MEAN, STD)

    dataset_dict["cifar100"] = replace(dataset_dict["cifar100"], read=noise)
    return f"noise of CIFAR-100's size, which is not in {root}"


def teacher_file(name: str, folder: Path) -> str:
    """The published teacher's checkpoint, or if it is missing, one of an `untrained` network."""
    with suppress(UserError):
        return str(teacher_checkpoint(cifar_model_dict[name][1], name))
    path = folder / f"{name}.pth"
    if not path.exists():
        torch.save({"model": untrained(name).state_dict()}, path)
    return str(path)


def race(
    method: str, pair: str, modes: list[str], args: argparse.Namespace, rates: dict[str, float], folder: Path
) -> dict[str, Any]:
    """One method on one pair: the classic path against the modes.

    Modes that the method refuses, and modes that failed, stand apart, with the reason. Ratios are to the first path.
    """
    teacher, student = pair.split("-")
    config = partial(settings, method, pair, teacher_file(teacher, folder), args.data, args.batch)
    more = ["EXPERIMENT.DEVICE", args.device]
    makers: dict[str, Callable[[], Runner]] = {}
    if not args.without_classic:
        makers["classic"] = lambda: classic(config([], more), args.workers)
    for mode in modes:
        place = tempfile.mkdtemp(dir=folder)
        own = [value.format(folder=place) for value in MODES[mode]]
        makers[mode] = lambda own=own: ours(config(own, more))
    entrants = Entrants(args.steps)
    for name, make in makers.items():
        entrants.enter(name, make)
    reached = take_turns({name: partial(entrants.turn, name) for name in entrants.runners}, args.rounds)
    result: dict[str, Any] = {}
    for name, runner in list(entrants.runners.items()):
        rate = rates["bfloat16" if "bf16" in name else "float32"]
        best = floor_rate(teacher, student, rate, distiller_dict[method].needs_teacher)
        try:
            asked = runner.asks()
        except Exception as error:
            entrants.drop(name, error)
            continue
        result[name] = {
            "images_per_second": spread(reached[name]),
            "milliseconds": spread([1000 * args.batch / rate for rate in reached[name]]),
            "ratio": ratio(reached[name], reached[next(iter(result), name)]),
            "held_mib": entrants.held_mib[name],
            **asked,
            "floor_images_per_second": best,
            "times_floor": best / spread(reached[name])["median"],
        }
    return {"modes": result, "refused": entrants.refused, "failed": entrants.failed}


class Entrants:
    """The paths of a race, as they are built and take turns. One that fails is dropped, with the reason.

    Attributes:
        held_mib: the device's memory that each has reserved for its data, networks and graph; None on a CPU.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.runners: dict[str, Runner] = {}
        self.held_mib: dict[str, float | None] = {}
        self.refused: dict[str, str] = {}
        self.failed: dict[str, str] = {}

    def enter(self, name: str, make: Callable[[], Runner]) -> None:
        """Build a path, and let it take a turn that is not counted: it compiles, and fills the teacher cache."""
        before = _reserved()
        try:
            runner = make()
            runner.images_per_second(self.steps)
        except UserError as error:
            self.refused[name] = str(error)
        except Exception as error:
            self.failed[name] = reason(error)
        else:
            self.runners[name] = runner
            self.held_mib[name] = _reserved() - before if runner.device.type == "cuda" else None

    def turn(self, name: str) -> float:
        """Images a second of a path's turn; NaN for one that fails, or has failed before."""
        if name not in self.runners:
            return float("nan")
        try:
            return self.runners[name].images_per_second(self.steps)
        except Exception as error:
            self.drop(name, error)
            return float("nan")

    def drop(self, name: str, error: Exception) -> None:
        """Let a path go, and its memory."""
        del self.runners[name]
        self.failed[name] = reason(error)


def _reserved() -> float:
    """The device's memory that this process has reserved and uses, in MiB."""
    if not torch.cuda.is_initialized():
        return 0.0
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved() / 2**20


def measure(
    args: argparse.Namespace, show: Callable[[dict[str, Any]], None] = lambda result: None
) -> dict[str, Any]:
    """All measurements, as --json prints them; `show` is called with them at the start and after each race."""
    device = pick_device(args.device)
    result: dict[str, Any] = {
        "machine": describe_run(str(device)), "device": str(device), "bfloat16_units": bfloat16_units(device),
        "data": use_data(args.data), "batch": args.batch, "steps": args.steps, "rounds": args.rounds,
        "workers": args.workers, "races": [],
    }  # fmt: skip
    rates = {name: convolution_rate(getattr(torch, name), device) for name in ("float32", "bfloat16")}
    result["best_gmacs_per_second"] = {name: rate / 1e9 for name, rate in rates.items()}
    show(result)
    with tempfile.TemporaryDirectory() as folder:
        for place, pair in enumerate(args.pairs):
            for method in args.methods if place == 0 else [m for m in args.methods if m in ON_EVERY_PAIR]:
                print(f"{method}, {pair} ...", file=sys.stderr, flush=True)
                for modes in [[mode] for mode in args.modes] if args.apart else [args.modes]:
                    raced = race(method, pair, modes, args, rates, Path(folder))
                    result["races"].append({"method": method, "pair": pair, **raced})
                    show(result)
    return result


def show_last(result: dict[str, Any], printed: bool, out: Path | None) -> None:
    """Print the last race, unless not `printed`, and write all of them to `out`."""
    if out is not None:
        write_whole(f"{json.dumps(result, indent=2)}\n".encode(), out)
    if not printed:
        return
    if not result["races"]:
        print(*head(result), sep="\n", flush=True)
        return
    *others, last = result["races"]
    new_pair = all(race["pair"] != last["pair"] for race in others)
    print(*(pair_head(last) if new_pair else []), *rows(last, result["device"]), sep="\n", flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), metavar="TEACHER-STUDENT")
    others = [name for name in distiller_dict if name not in (*ON_EVERY_PAIR, "DCGD")]
    parser.add_argument("--methods", nargs="+", default=[*ON_EVERY_PAIR, *others], choices=[*distiller_dict])
    parser.add_argument("--modes", nargs="+", default=["default", "bf16"], choices=[*MODES])
    parser.add_argument("--data", default=str(REPOSITORY / "data"), help="has cifar-100-python; else noise is used")
    parser.add_argument("--apart", action="store_true", help="each mode is a race of its own, written once it is over")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="steps per turn")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each path")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of the classic path's DataLoader")
    parser.add_argument("--without-classic", action="store_true", help="leave out the classic path")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the tables")
    parser.add_argument("--out", type=Path, help="write the JSON here, after each race")
    return parser.parse_args(arguments)


@tool()
def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    result = measure(args, partial(show_last, printed=not args.json, out=args.out))
    if args.json:
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
