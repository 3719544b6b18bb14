"""Run a plan of configs x overrides x seeds, and put the results into a table.

    mdistiller table plans/digits.yaml
    mdistiller table plans/cifar100_same_style.yaml --jobs 4      # four at a time, also on a single GPU
    mdistiller table plans/cifar100_same_style.yaml --jobs 4 --only 'KD, resnet56 -> resnet20' LOG.WANDB False

Every run is `mdistiller train` in a separate folder. After an interruption, the same command continues with the missing
runs; a run that fails is reported, and the others continue. The table is written next to the runs, as table.md, .csv,
.json and .png. The form of a plan is described in mdistiller/experiments/plan.py and docs/comparing.md.
"""

from __future__ import annotations

import argparse
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from ..analysis.plots.bars import draw_bars
from ..arguments import PathArgument
from ..console import tool
from ..engine.overrides import note_repeats
from ..errors import UserError
from ..experiments.jobs import Job, finished_run, task
from ..experiments.launch import run_here, run_on_ray, visible_gpus
from ..experiments.plan import Plan, read_plan
from ..experiments.summary import save_table, summarise
from ..experiments.table_text import table_markdown, write_csv
from ..user_files import writing
from ._arguments import command_parser, override_arguments


def parse_args(arguments: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = command_parser(__doc__, prog)
    parser.add_argument("plan", help="the plan's YAML file; plans/ holds the published ones")
    parser.add_argument(
        "--jobs", type=int, metavar="N",
        help="number of runs at a time (default: one for each GPU, else one); more than there are GPUs share them",
    )  # fmt: skip
    parser.add_argument("--only", default="", help="regular expression: run what it finds in 'method, pair, seed N'")
    parser.add_argument("--dry-run", action="store_true", help="list the commands of the missing runs, and run nothing")
    parser.add_argument("--no-run", action="store_true", help="make the table from the finished runs, and run nothing")
    parser.add_argument("--ray", metavar="ADDRESS", help="run on a Ray cluster: auto, host:port, or local to start one")
    parser.add_argument(
        "-o", "--out", action=PathArgument, type=Path, help="the table's folder (default: the runs' folder)"
    )
    override_arguments(parser, "overrides of the plan's settings, such as SOLVER.EPOCHS 1")
    args = parser.parse_intermixed_args(arguments)
    if args.jobs is not None and args.jobs < 1:
        parser.error(f"--jobs must be at least 1, not {args.jobs}")
    if args.jobs is not None and args.ray is not None:
        parser.error("--jobs is for this machine; with --ray the cluster runs one for each GPU or core: leave one out")
    try:
        re.compile(args.only)
    except re.error as error:
        parser.error(f"--only {args.only!r} is not a regular expression: {error}")
    return args


def missing(jobs: list[Job], failed: dict[str, str]) -> list[Job]:
    """The jobs that are not finished; one whose folder holds a run with another configuration is put into `failed`."""
    left = []
    for job in jobs:
        try:
            if finished_run(job) is None:
                left.append(job)
        except UserError as error:
            failed[job.label] = str(error)
            print(f"failed: {job.label}: {error}", file=sys.stderr)
    return left


def run(jobs: list[Job], args: argparse.Namespace, failed: dict[str, str]) -> None:
    """Run the unfinished ones of `jobs`, and print a line for each when it ends."""
    left = missing(jobs, failed)
    if args.dry_run:
        for job in left:
            print(shlex.join(["python", *task(job).command[1:]]))
        return
    gpus = visible_gpus()
    here = args.ray is None or not left
    # An interrupt may come in this loop, too; then an iterator that is not closed would go on with its runs.
    with closing(run_here(left, args.jobs or len(gpus) or 1, gpus) if here else run_on_ray(left, args.ray)) as outcomes:
        for number, (job, error) in enumerate(outcomes, start=1):
            done = None if error else finished_run(job)
            if done is None:
                failed[job.label] = error or "ended without its last epoch"
                said = f"failed: {job.label}: {failed[job.label]} (see {job.folder}/train.log)"
                print(said, file=sys.stderr, flush=True)
            else:
                result = f"top-1 last {done.last:.2f}, best {done.best:.2f}, {done.seconds:.0f} s"
                print(f"[{number}/{len(left)}] {job.label}: {result}", flush=True)


def write_table(plan: Plan, args: argparse.Namespace, out: Path) -> None:
    table = summarise(plan, args.opts)
    text = table_markdown(table)
    with writing(out / "table.md"):
        (out / "table.md").write_text(text, encoding="utf-8")
        write_csv(table, out / "table.csv")
        save_table(table, out / "table.json")
        draw_bars(table, out / "table.png")
    print(f"\n{text}\nwrote {out}/table.md, .csv, .json, .png")


@tool()
def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    args = parse_args(arguments, prog)
    failed: dict[str, str] = {}
    plan = read_plan(args.plan)
    note_repeats(args.opts)
    jobs = [job for pair in plan.pairs for name in plan.methods for job in plan.jobs(pair, name, args.opts)]
    folders = [job.folder for job in jobs]
    for job in jobs:
        if folders.count(job.folder) > 1:
            raise UserError(f"plan {args.plan}: two runs would share {job.folder}; give their methods other names")
    chosen = [job for job in jobs if re.search(args.only, job.label)]
    if not chosen:
        raise UserError(f"--only {args.only!r} matches no run; the first run is {jobs[0].label!r}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if not args.no_run:
        try:
            run(plan.before, args, failed)
            if not failed:
                run(chosen, args, failed)
        except KeyboardInterrupt:
            print("interrupted; the same command continues with the missing runs", file=sys.stderr)
            raise SystemExit(130) from None
    if not args.dry_run:
        write_table(plan, args, args.out or jobs[0].folder.parent)
    if failed:
        print(f"{len(failed)} run(s) failed: {'; '.join(failed)}", file=sys.stderr)
        raise SystemExit(1)
