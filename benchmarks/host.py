#!/usr/bin/env python
"""What a training step costs the host: its Python and torch's dispatcher, where that goes, and operations a step.

    python benchmarks/host.py
    python benchmarks/host.py --methods KD NST --rounds 5 --against ../before --json

On a GPU a step of small networks waits for the host, which starts one kernel or more for every operation. Here the
host's share is measured without a GPU: two images of 4x4 pixels, so that the arithmetic is negligible, on one thread,
through the trainer's own loop, in processor time of that thread. What a GPU has otherwise than a processor is set as
there: the fused optimizer, and losses read every 50 steps.

The bare loop is what one would write by hand around the same method: its networks as they are, on one batch that is
ready; forward pass, sum of the losses, backward pass, SGD. So a trainer's step may be the cheaper one, where it runs
its teacher folded.

Operations are what torch's dispatcher sees below autograd, without views and allocations; images have 32x32 pixels for
this, as some losses pool by size. An operation on a list of tensors (`_foreach`) counts once.

Every turn is a process of its own, alternately of this tree and, with --against, of another one.

Reached with `--methods KD --steps 40`, one turn, on two cores of an AMD EPYC with torch 2.14, 2026-11-27, at a load of
11 by other work (15 % are noise, so it is to be run again on a quiet machine): KD, resnet56 -> resnet20, 19.0 ms a step
and 24.8 ms of the bare loop; the tree of the day before took 22.8 ms and 26.1 ms, in a turn at the same time. 371
operations a step, before 383. No GPU was available: not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from timing import spread

REPOSITORY = Path(__file__).resolve().parents[1]
METHODS = ("NONE", "KD", "DKD", "CRD", "REVIEWKD", "NST", "DCGD_KD", "OFD", "VID", "SP")
SHARES = (
    "loader", "prepare_batch", "schedule", "frozen checks", "student", "teacher", "loss", "backward", "norm",
    "NaN watch", "optimizer", "after_step", "EMA", "accuracy", "meters", "progress bar", "signals", "other",
)  # fmt: skip
SMALL = 4  # pixels
# The first steps of an epoch check every weight of the frozen networks; CRD's first one sets its constants.
_WARM_UP = 5


class Shares:
    """Processor time, or operations, by the part of the step that is running.

    Attributes:
        steps: of each step, the amount by part.
    """

    def __init__(self) -> None:
        self.steps: list[Counter[str]] = []
        self.operations: Counter[str] = Counter()  # by name, of all steps
        self._own: Counter[str] = Counter()
        self._stack = ["other"]
        self._since = time.thread_time()

    def _settle(self) -> None:
        now = time.thread_time()
        self._own[self._stack[-1]] += now - self._since  # type: ignore[assignment]
        self._since = time.thread_time()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A context whose time belongs to `name`, without that of inner contexts."""
        self._settle()
        self._stack.append(name)
        try:
            yield
        finally:
            self._settle()
            self._stack.pop()

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose calls are the part `name`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return run

    def split(self, batches: Iterator[Any]) -> Iterator[Any]:
        """`batches`; each begins a step."""
        while True:
            self._settle()
            self.steps.append(self._own)
            self._own = Counter()
            with self.part("loader"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    @contextmanager
    def counting(self) -> Iterator[None]:
        """A context in which operations are counted in place of time."""
        from torch.utils._python_dispatch import TorchDispatchMode

        shares = self
        self._settle = lambda: None  # type: ignore[method-assign]

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if is_work(func):
                    shares._own[shares._stack[-1]] += 1
                    shares.operations[str(func).removeprefix("aten.")] += 1
                return func(*args, **(kwargs or {}))

        with Count():
            yield


def is_work(func: Any) -> bool:
    """Whether an operation computes something: it returns no view, and not just memory."""
    views = [result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns]
    name = func._schema.name.removeprefix("aten::")
    idle = "empty" in name or name in ("_unsafe_view", "lift_fresh", "detach") or name.startswith("profiler::")
    return not (idle or any(views))


def settings(method: str, pair: str, folder: Path, ema: float) -> list[str]:
    """What a run of `method` sets beyond the defaults."""
    teacher, student = pair.split("-")
    words = [
        "DISTILLER.TYPE", method, "DISTILLER.TEACHER", teacher, "DISTILLER.TEACHER_CKPT", str(folder / "teacher.pth"),
        "DISTILLER.STUDENT", student, "SOLVER.BATCH_SIZE", "2", "LOG.WANDB", "False", "LOG.PREFIX", str(folder),
        "EXPERIMENT.DEVICE", "cpu", "SOLVER.EMA", str(ema),
        "CRD.NCE.K", "64", "SOLVER.LR", "1e-6",
    ]  # fmt: skip
    words += ["SOLVER.TRAINER", "crd"] if method == "CRD" else []
    return words + (["DCGD.GROUPS", "res56"] if method.startswith("DCGD") else [])


@contextmanager
def prepared(method: str, pair: str, size: int, images: int, ema: float = 0.0) -> Iterator[tuple[Any, Any]]:
    """A trainer of `method` on noise of `size` x `size` pixels, and its configuration."""
    import torch
    from untrained import untrained

    from mdistiller.dataset import ImageArray, dataset_dict
    from mdistiller.dataset.cifar100 import MEAN, STD
    from mdistiller.engine import optimizers
    from mdistiller.engine.build import build_trainer
    from mdistiller.engine.cfg import load_cfg

    torch.set_num_threads(1)
    torch.backends.mkldnn.set_flags(False)  # oneDNN prepares each small convolution for longer than torch's own takes
    torch.manual_seed(0)
    noise = torch.randint(0, 256, (images, size, size, 3), dtype=torch.uint8)
    data = ImageArray(noise, torch.arange(images) % 100, MEAN, STD)
    small = replace(dataset_dict["cifar100"], image_size=size, read=lambda *_: data)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stack.enter_context(patch.dict(dataset_dict, {"cifar100": small}))
        stack.enter_context(patch.object(optimizers, "_fused", bool))  # as on a GPU
        torch.save({"model": untrained(pair.split("-")[0], size).state_dict()}, Path(folder) / "teacher.pth")
        cfg = load_cfg(os.devnull, settings(method, pair, Path(folder), ema))
        trainer = build_trainer(cfg)
        if hasattr(trainer.nan_policy, "every"):
            trainer.nan_policy.every = 50  # as on a GPU
        yield trainer, cfg


def train(trainer: Any, shares: Shares, apart: bool, counting: bool = False) -> None:
    """One epoch through the trainer's own loop, without validation and files; `apart`: by its parts."""
    from mdistiller.distillers import Distiller
    from mdistiller.distillers.OFD import OFD
    from mdistiller.engine import step as step_module
    from mdistiller.engine import trainer as loop
    from mdistiller.engine.meters import Meters
    from mdistiller.engine.progress_bar import ProgressBar
    from mdistiller.engine.scores import Score

    distiller, step = trainer.distiller, trainer.step
    own_student = getattr(distiller.student, "base", distiller.student)
    points = [
        (loop, "adjust_learning_rate", "schedule"), (trainer, "prepare_batch", "prepare_batch"),
        (step.frozen, "check", "frozen checks"), (step.frozen, "_check", "frozen checks"),
        (own_student, "forward", "student"),
        (Distiller, "frozen_forward", "teacher"), (OFD, "teacher_forward", "teacher"),
        (distiller, "forward", "loss"), (distiller, "after_step", "after_step"),
        (trainer.update, "backward", "backward"), (trainer.update, "norm", "norm"),
        (trainer.update, "step", "optimizer"),
        (trainer.nan_policy, "begin_step", "NaN watch"), (trainer.nan_policy, "drops", "NaN watch"),
        (step_module, "correct_counts", "accuracy"), (Meters, "add", "meters"),
        (ProgressBar, "update", "progress bar"), (trainer, "_save_or_stop", "signals"),
    ]  # fmt: skip
    if trainer.ema is not None:
        points.append((trainer.ema, "update", "EMA"))
    if hasattr(distiller.student, "forward_grouped"):
        points.append((distiller.student, "forward_grouped", "student"))
    with ExitStack() as stack:
        for owner, name, share in points if apart else ():
            stack.enter_context(patch.object(owner, name, shares.around(share, getattr(owner, name))))
        begin = loop.batches_from
        stack.enter_context(patch.object(loop, "batches_from", lambda *args: shares.split(begin(*args))))
        stack.enter_context(patch.object(trainer, "validate", lambda at: {"": Score(0.0, 0.0, 0.0)}))
        stack.enter_context(patch.object(trainer, "_end_epoch", lambda *_: None))
        stack.enter_context(patch.object(trainer.state, "save_within", lambda at: None))
        if counting:
            stack.enter_context(shares.counting())
        trainer.train_epoch(1)
    # The first entry is what came before the first step.
    del shares.steps[: _WARM_UP + 1]


def bare(trainer: Any, cfg: Any, steps: int) -> tuple[float, int]:
    """Microseconds and operations of a step of the bare loop."""
    import torch

    from mdistiller.distillers import RunFacts
    from mdistiller.distillers.contract import learnable_parameters
    from mdistiller.engine.build import build_distiller

    distiller = build_distiller(cfg, replace(RunFacts.of(cfg), num_data=len(trainer.train_loader.targets)))
    distiller.train()
    batch = trainer.prepare_batch(next(iter(trainer.train_loader)), 1)
    solver = cfg.SOLVER
    options = {"lr": solver.LR, "momentum": solver.MOMENTUM, "weight_decay": solver.WEIGHT_DECAY, "fused": True}
    optimizer = torch.optim.SGD(learnable_parameters(distiller), **options)

    def step() -> None:
        _, losses = distiller(**batch, epoch=1)
        torch.stack([*losses.values()]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = []
    for _ in range(_WARM_UP + steps):
        start = time.thread_time()
        step()
        seconds.append(time.thread_time() - start)
    shares = Shares()
    with shares.counting():
        step()
    return undisturbed(seconds[_WARM_UP:]), sum(shares.operations.values())


def undisturbed(seconds: Iterable[float]) -> float:
    """The lower quartile, in microseconds: work on the same core's other thread makes some steps slower."""
    return statistics.quantiles(seconds, n=4)[0] * 1e6


def operations(method: str, pair: str, size: int = 32, ema: float = 0.0) -> tuple[Counter[str], Counter[str]]:
    """Operations of one step by part, and by the operation's name."""
    with prepared(method, pair, size, 2 * (_WARM_UP + 1), ema) as (trainer, _):
        shares = Shares()
        train(trainer, shares, apart=True, counting=True)
        (last,) = shares.steps
        return last, shares.operations


def child(method: str, pair: str, steps: int, counting: bool) -> dict[str, Any]:
    """One turn: microseconds of a step, by part and in total, and of the bare loop; also operations, if `counting`."""
    images = 2 * (_WARM_UP + steps)
    with prepared(method, pair, SMALL, images) as (trainer, cfg):
        shares = Shares()
        train(trainer, shares, apart=False)
        total = undisturbed(sum(step.values()) for step in shares.steps)
        alone, alone_operations = bare(trainer, cfg, steps)
    with prepared(method, pair, SMALL, images, ema=0.999) as (trainer, _):
        shares = Shares()
        train(trainer, shares, apart=True)
        parts = {part: undisturbed(step[part] for step in shares.steps) for part in SHARES}
    counts = operations(method, pair, ema=0.999)[0] if counting else Counter()
    return {
        "total": total, "parts": parts, "operations": sum(counts.values()) - counts["EMA"],
        "operations_by_part": dict(counts), "bare": alone, "bare_operations": alone_operations,
    }  # fmt: skip


def turn(source: Path, method: str, args: argparse.Namespace, counting: bool) -> dict[str, Any]:
    """`child` in a process of its own, of the package in `source`."""
    command = [sys.executable, __file__, "--child", "--methods", method, "--pair", args.pair]
    command += ["--steps", str(args.steps), *(["--counting"] if counting else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(source)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(args: argparse.Namespace) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The turns of every method by tree: "this" and, if there is one, "against"."""
    trees = {"this": REPOSITORY, **({"against": args.against.resolve()} if args.against else {})}
    reached: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for method in args.methods:
        reached[method] = {name: [] for name in trees}
        for number in range(args.rounds):
            for name, source in trees.items():
                reached[method][name].append(turn(source, method, args, counting=number == 0))
    return reached


def table(reached: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """The turns as Markdown: the medians of the totals, then those of the parts."""
    lines = ["| method | tree | microseconds a step | bare loop | operations | bare loop |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    columns = {(method, tree): turns for method, trees in reached.items() for tree, turns in trees.items()}
    for (method, tree), turns in columns.items():
        total, alone = spread([t["total"] for t in turns]), spread([t["bare"] for t in turns])
        lines.append(
            f"| {method} | {tree} | {total['median']:.0f} ({total['low']:.0f}-{total['high']:.0f}) "
            f"| {alone['median']:.0f} | {turns[0]['operations']} | {turns[0]['bare_operations']} |"
        )
    lines += ["", "Microseconds and operations of each part:", ""]
    lines += ["| part | " + " | ".join(map(" ".join, columns)) + " |", "|---|" + "---:|" * len(columns)]
    for part in SHARES:
        cells = [
            f"{spread([t['parts'][part] for t in turns])['median']:.0f}, {turns[0]['operations_by_part'].get(part, 0)}"
            for turns in columns.values()
        ]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--pair", default="resnet56-resnet20", metavar="TEACHER-STUDENT")
    parser.add_argument("--steps", type=int, default=60, help="steps of each turn that count")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each method and tree")
    parser.add_argument("--against", type=Path, metavar="DIR", help="another tree of this project, to compare with")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--counting", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    if args.child:
        print(json.dumps(child(args.methods[0], args.pair, args.steps, args.counting)))
        return
    reached = measure(args)
    print(json.dumps(reached) if args.json else table(reached))


if __name__ == "__main__":
    main()
