"""Where the time of one step goes: kernels by time on a GPU, operations by time on a CPU; launches and waits.

    python benchmarks/kernels.py --modes eager graph --out profile.json

Each mode is written to --out once it is measured; one that fails, or is refused, is written with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a clone, not installed
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no message of the profiler that there is no GPU,
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # nor about memory allocated before it started

from counting import counts, kernels, operations, profiled
from step import MODES, ours, settings, teacher_file, use_data

from mdistiller.console import reason, tool
from mdistiller.engine.files.atomic import write_whole
from mdistiller.engine.runtime.device import pick_device
from mdistiller.engine.runtime.environment import describe_run
from mdistiller.errors import UserError

STEPS = 10
WARM = 16  # kernels are chosen, memory is allocated, a graph is recorded
LONGEST = 25


def measured(mode: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A mode's counts a step, its time on the device and its longest kernels, or on a CPU operations."""
    place = tempfile.mkdtemp(dir=folder)
    own = [value.format(folder=place) for value in MODES[mode]]
    teacher = teacher_file(args.pair.split("-")[0], folder)
    cfg = settings(
        args.method, args.pair, teacher, args.data, args.batch, own, ["EXPERIMENT.DEVICE", args.device]
    )
    runner = ours(cfg)
    batches = runner.batches()
    for _ in range(args.warm):
        runner.train(next(batches))
    record = profiled(lambda: runner.train(next(batches)), args.steps, runner.device)
    by_time = (kernels if runner.device.type == "cuda" else operations)(record, args.steps)
    return {
        **counts(record, args.steps, runner.device),
        "milliseconds": sum(row["milliseconds"] for row in by_time),
        "longest": by_time[:LONGEST],
    }


def table(mode: str, result: dict[str, Any]) -> str:
    """A mode's measurements as Markdown."""
    said = ", ".join(f"{result[name]:.1f} {name}" for name in result if name not in ("milliseconds", "longest"))
    lines = [f"### {mode}", "", f"a step: {said}; {result['milliseconds']:.3f} ms in all of them", ""]
    lines += ["| ms a step | share | times a step | name |", "|---:|---:|---:|---|"]
    for row in result["longest"]:
        share = 100 * row["milliseconds"] / max(result["milliseconds"], 1e-9)
        name = row["name"].replace("|", "\\|")[:110]
        lines.append(f"| {row['milliseconds']:.4f} | {share:.1f} % | {row['count']:.1f} | `{name}` |")
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="resnet56-resnet20", metavar="TEACHER-STUDENT")
    parser.add_argument("--method", default="KD")
    parser.add_argument("--modes", nargs="+", default=["eager", "graph"], choices=[*MODES])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=STEPS, help="steps that are recorded")
    parser.add_argument("--warm", type=int, default=WARM, help="steps before them")
    parser.add_argument("--data", default="data", help="has cifar-100-python; else noise is used")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(arguments)


@tool()
def main() -> None:
    args = parse()
    device = pick_device(args.device, key="--device")
    result: dict[str, Any] = {
        "machine": describe_run(str(device)), "device": str(device), "data": use_data(args.data),
        "method": args.method, "pair": args.pair, "batch": args.batch, "modes": {}, "refused": {}, "failed": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for mode in args.modes:
            try:
                result["modes"][mode] = measured(mode, args, Path(folder))
            except UserError as error:
                result["refused"][mode] = str(error)
            except Exception as error:
                result["failed"][mode] = reason(error)
            write_whole(f"{json.dumps(result, indent=2)}\n".encode(), args.out)
            print(table(mode, result["modes"][mode]) if mode in result["modes"] else f"{mode}: none", flush=True)


if __name__ == "__main__":
    main()
