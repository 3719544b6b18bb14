#!/usr/bin/env python
"""Everything that a GPU can show of this library, within eight minutes: `make gpu`.

    python benchmarks/gpu.py                                    # writes output/gpu/report.md and report.json
    python benchmarks/gpu.py --only step profile --scale 3      # these stages, with three times their limits
    python benchmarks/gpu.py --device cpu --quick               # rehearses the command where there is no GPU

Each stage is a process with a time limit, at which it is ended with all that it has started. The report is written anew
after each stage, and holds what every stage has done so far, also of one that failed, or that a signal has stopped. The
training has in addition the time that the stages before it did not need. It takes neither a network nor wandb. Without
CIFAR-100 or the published teacher, the trainings that need them are skipped by name, and the other stages take noise,
or an untrained teacher.

The limits follow a first run on an NVIDIA H200, 2026-11-28 (docs/performance.md), and are not yet tried there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a clone, not installed

import torch
import trainings
from gpu_report import markdown
from stages import GRACE, Outcome, run_stage

from mdistiller.console import tool
from mdistiller.engine.files.atomic import write_whole
from mdistiller.errors import UserError
from mdistiller.system import usable_cpus

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = Path(__file__).resolve().parent
PAIR = "resnet56-resnet20"
METHODS = ("KD", "DKD", "CRD", "REVIEWKD", "NST", "DCGD_KD")
# The modes of every method come first, then those that KD alone takes, then those that compile for half a minute each.
MODES = ("eager", "graph", "bf16, graph")
MORE_MODES = ("teacher cache in memory", "bf16, teacher cache in memory", "bf16, eager", "NCHW, eager", "fp16")
COMPILED = ("bf16, compile, graph", "compile, graph", "bf16, compile, teacher cache in memory, graph")
PROCESSES_OF_TESTS = min(8, max(1, usable_cpus() // 2))
# The stages that run step.py.
STEPS = ("step", "modes", "compiled")

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]

Command = Callable[[argparse.Namespace], list[str]]


@dataclass(frozen=True)
class Stage:
    """A part of the report.

    Attributes:
        limit: in seconds.
        command: from the arguments to its command line; it writes <out>/<name>.json.
        takes_left_over: whether it has the time, too, that the stages before it did not need.
        grace: seconds that its processes have to end by themselves at the limit.
    """

    name: str
    limit: float
    command: Command
    takes_left_over: bool = False
    grace: float = GRACE


def _script(name: str, args: argparse.Namespace, *more: str) -> list[str]:
    return [sys.executable, str(FOLDER / name), "--device", args.device, *more]


def _machine(args: argparse.Namespace) -> list[str]:
    return _script("machine.py", args, "--out", f"{args.out / 'machine.json'}")


def _tests(args: argparse.Namespace) -> list[str]:
    words = [sys.executable, "-m", "pytest", "tests/cuda", "-q", "-p", "no:cacheprovider"]
    if args.quick:
        return [*words, "-k", "test_data"]
    try:
        import xdist  # noqa: F401  # from the extra "dev", which a user need not have
    except ImportError:
        return words
    return [*words, "-n", str(PROCESSES_OF_TESTS)]


def _step(name: str, methods: tuple[str, ...], modes: tuple[str, ...], *more: str) -> Command:
    """The command of a stage that runs step.py."""

    def command(args: argparse.Namespace) -> list[str]:
        words = ["--without-classic", "--out", f"{args.out / name}.json", "--data", str(args.data), *more]
        if args.quick:
            small = ["--pairs", "resnet14-resnet8", "--batch", "4", "--steps", "1", "--rounds", "1"]
            return _script("step.py", args, *words, *small, "--methods", "KD", "--modes", "eager", "graph")
        sizes = ["--pairs", PAIR, "--steps", "40", "--rounds", "3", "--threads", str(min(8, usable_cpus()))]
        return _script("step.py", args, *words, *sizes, "--methods", *methods, "--modes", *modes)

    return command


def _profile(args: argparse.Namespace) -> list[str]:
    words = ["--out", f"{args.out / 'profile.json'}", "--data", str(args.data)]
    small = ["--pair", "resnet14-resnet8", "--batch", "4", "--steps", "1", "--warm", "1"] if args.quick else []
    return _script("kernels.py", args, *words, *small)


def _train(args: argparse.Namespace) -> list[str]:
    words = ["--folder", f"{args.out / 'runs'}", "--data", str(args.data), "--amp", args.amp]
    return _script("trainings.py", args, *words, *(["--quick"] if args.quick else []))


# In this order. The limits, and a few seconds to end each stage, are eight minutes.
STAGES = (
    Stage("machine", 15, _machine),
    Stage("tests", 165, _tests),
    Stage("step", 75, _step("step", METHODS, MODES)),
    Stage("profile", 25, _profile),
    Stage("modes", 30, _step("modes", METHODS[:1], MORE_MODES, "--apart")),
    Stage("compiled", 80, _step("compiled", METHODS, COMPILED, "--apart")),
    Stage("train", 60, _train, takes_left_over=True, grace=13),  # checkpoints are saved, a daemon is ended
)


class Interrupted(BaseException):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _interrupt(number: int, frame: object) -> None:
    for other in SIGNALS:  # a second one would stop the report
        signal.signal(other, signal.SIG_IGN)
    raise Interrupted(number)


class Report:
    """The files report.md and report.json in `args.out`, of the stages so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.begun = time.time()
        self.outcomes: list[Outcome] = []

    def add(self, outcome: Outcome) -> None:
        """Write both files anew, with one stage more."""
        self.outcomes.append(outcome)
        self.write()
        words = f"{outcome.name}: {outcome.status}, {outcome.seconds:.0f} s of {outcome.limit:.0f}"
        print(f"{words}; {outcome.note}" if outcome.note else words, flush=True)

    def write(self) -> None:
        """Write both files."""
        content = self.content()
        write_whole(f"{json.dumps(content, indent=2)}\n".encode(), self.args.out / "report.json")
        write_whole(f"{markdown(content)}\n".encode(), self.args.out / "report.md")

    def content(self) -> dict[str, Any]:
        """All results, as report.json holds them."""
        return {
            "rehearsal": self.args.device == "cpu",
            "quick": self.args.quick,
            "command": " ".join(sys.argv),
            "begun": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.begun)),
            "seconds": time.time() - self.begun,
            "stages": [asdict(outcome) for outcome in self.outcomes],
            **{name: self._of_stage(name) for name in ("machine", *STEPS, "profile")},
            "tests": self._tests(),
            "train": trainings.results(self.args.out / "runs") if "train" in self.args.only else {},
        }

    def _of_stage(self, name: str) -> Any:
        """What a stage has written; None if it has written nothing."""
        path = self.args.out / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def _tests(self) -> list[dict[str, Any]]:
        """The tests' results: one line of JSON each, the last of which may be torn."""
        path = self.args.out / "tests.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]


def run_stages(args: argparse.Namespace, report: Report, stages: tuple[Stage, ...]) -> None:
    """Run the chosen stages one after another, each within its limit."""
    skipped = trainings.missing(args.data, args.quick)
    left_over = 0.0
    for stage in (stage for stage in stages if stage.name in args.only):
        lacking = skipped if stage.name == "train" else {}
        if lacking and len(lacking) == len(trainings.TRAININGS):
            report.add(Outcome(stage.name, "skipped", note=next(iter(lacking.values()))))
            continue
        limit = stage.limit * args.scale + (left_over if stage.takes_left_over else 0)
        environment = {
            "PYTHONUNBUFFERED": "1", "MPLBACKEND": "agg", "MDISTILLER_TEST_DEVICE": args.device,
            "MDISTILLER_TEST_RESULTS": str(args.out / "tests.jsonl"),
        }  # fmt: skip
        if stage.name == "tests":  # several processes on these cores
            environment["OMP_NUM_THREADS"] = "1"
        start = time.monotonic()
        try:
            output = args.out / f"{stage.name}.txt"
            outcome = run_stage(stage.name, stage.command(args), limit, output, environment, REPOSITORY, stage.grace)
        except Interrupted as stopped:
            note = f"stopped by signal {stopped.number}"
            report.add(Outcome(stage.name, "interrupted", time.monotonic() - start, limit, note))
            raise
        if lacking:
            skips = f"{' and '.join(lacking)} skipped: {next(iter(lacking.values()))}"
            outcome.note = "; ".join(filter(None, (outcome.note, skips)))
        report.add(outcome)
        left_over += limit - outcome.seconds if not stage.takes_left_over else 0


def clear(out: Path, names: list[str]) -> None:
    """Make the folder `out`, and remove from it what these stages will write."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("report", *names):
        for ending in ("json", "jsonl", "txt", "md"):
            (out / f"{name}.{ending}").unlink(missing_ok=True)
    if "train" in names:
        shutil.rmtree(out / "runs", ignore_errors=True)


def check_device(device: str) -> None:
    """Refuse to start where the report would say nothing.

    Raises:
        UserError: there is no GPU, and none was to be rehearsed.
    """
    if device == "cpu" or torch.cuda.is_available():
        return
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    raise UserError(
        f"torch {torch.__version__}, built {built}, finds no GPU for --device {device}; `make gpu` measures one "
        "(`nvidia-smi` says whether there is one), and --device cpu --quick rehearses it without"
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage.name for stage in STAGES]
    parser.add_argument("--out", type=Path, default=REPOSITORY / "output" / "gpu", help="the folder of the report")
    parser.add_argument("--data", type=Path, default=REPOSITORY / "data", help="the folder with cifar-100-python")
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="STAGE", help=", ".join(names))
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the time limits")
    parser.add_argument("--amp", default="none", choices=["none", "bf16", "fp16"], help="SOLVER.AMP of the trainings")
    parser.add_argument("--device", default="cuda", help="cpu: a rehearsal without a GPU")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for a rehearsal")
    args = parser.parse_args(arguments)
    args.out, args.data = args.out.resolve(), args.data.resolve()
    return args


@tool()
def main() -> None:
    args = parse()
    check_device(args.device)
    clear(args.out, args.only)
    report = Report(args)
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    try:
        run_stages(args, report, STAGES)
    except Interrupted as stopped:
        raise SystemExit(128 + stopped.number) from None
    finally:
        print(f"-> {args.out / 'report.md'}", flush=True)
    if any(outcome.status == "failed" for outcome in report.outcomes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
