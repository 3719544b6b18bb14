"""Random combinations of the modes, killed at random moments, in processes started from scratch; for tests/soak.py."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from .combinations import COMPILED, FACTORS, OFF, SIGNALS, TOOL, allowed, described, run_of, world_of
from .covering import Case, random_case
from .runs import ONE_THREAD, Run, differences
from .small import write_data

KILLS = 3  # of a combination
LONGER = {"SOLVER.EPOCHS": "8"}  # so that there is time for them
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
STOPPED = "the same command with --resume goes on from here"


@dataclass
class Result:
    """What became of one combination.

    Attributes:
        number: it is drawn from (seed, number).
        kills: how many of each signal came while it trained.
        found: how it differs from a run that was never stopped, and what else went wrong.
    """

    number: int
    case: Case
    kills: dict[str, int]
    found: list[str]


def drawn(seed: int, number: int) -> Case:
    """A combination; one in ten is compiled, which takes longest."""
    draw = random.Random(f"{seed} {number}")
    factors = {**FACTORS, COMPILED[0]: COMPILED[1:] if draw.random() < 0.1 else (OFF,)}
    return random_case(factors, allowed, draw)


def launch(world: int, arguments: list[str], folder: Path, output: Path, environment: dict[str, str]):
    """One process, or torchrun with `world` of them, in a session of its own."""
    ranks = [*TORCHRUN, str(world)] if world > 1 else []
    with output.open("a") as out:
        return subprocess.Popen(
            [sys.executable, *ranks, str(TOOL), *arguments], cwd=folder, stdout=out, stderr=out,
            start_new_session=True, env=os.environ | ONE_THREAD | environment,
        )  # fmt: skip


def soak_one(seed: int, number: int, folder: Path) -> Result:
    """Train a combination through, then again with kills at random moments; `folder` holds the data."""
    case, moments = drawn(seed, number), random.Random(f"{number} {seed}")
    start = partial(launch, world_of(case))

    def made(name: str) -> Run:
        run = run_of(case, folder / f"{name}{number}", start)
        run.settings |= LONGER
        return run

    result = Result(number, case, dict.fromkeys(SIGNALS, 0), [])
    try:
        whole, stopped = made("whole"), made("stopped")
        whole.finish()
        seconds = _training_seconds(whole)
        for _ in range(KILLS):
            name = moments.choice(list(SIGNALS))
            sent, wrong = _kill(stopped, SIGNALS[name], moments.uniform(0, seconds / 2))
            result.kills[name] += sent
            result.found += wrong
        stopped.finish()
        result.found += differences(whole.log_path, stopped.log_path)
    except AssertionError as error:
        result.found.append(str(error)[-1000:])
    return result


def _training_seconds(run: Run) -> float:
    """The seconds between the first file of a run that has ended and its last checkpoint."""
    return (run.log_path / "latest").stat().st_mtime - (run.log_path / "config.yaml").stat().st_mtime


def _kill(run: Run, number: int, seconds: float) -> tuple[bool, list[str]]:
    """Start or resume a run and send it a signal after `seconds` of training, as a batch system or a power cut does.

    Returns:
        Whether the signal came before the run's end, and what went wrong.
    """
    said = len(run.output.read_text()) if run.output.exists() else 0
    lock = _lock(run)
    process = run.start()
    _wait_for_training(run, process, lock)
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    family = list(_family(process.pid))
    if process.poll() is None and number == signal.SIGKILL:
        for pid in family:  # torchrun's ranks are not in its process group
            with suppress(ProcessLookupError):
                os.kill(pid, number)
    elif process.poll() is None:
        os.killpg(process.pid, number)
    status = process.wait(120)
    new = run.output.read_text()[said:]
    if "Best accuracy" in new or "is trained already" in new:
        return False, []
    wrong = []
    if number == signal.SIGTERM and STOPPED not in new:
        errors = [line for line in new.splitlines() if "rror: " in line]
        wrong.append(f"SIGTERM was not survived: {'; '.join(errors[:3]) or new[-1000:]}")
    time.sleep(2)  # for workers that end by themselves
    left = [pid for pid in family if Path(f"/proc/{pid}/cwd").exists() and _is_of(pid, run)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return True, wrong + ([f"{len(left)} processes lived on, exit status {status}"] if left else [])


def _wait_for_training(run: Run, process: subprocess.Popen, lock: str) -> None:
    """Wait until the run has written another lock than `lock`, or has ended."""
    while process.poll() is None and _lock(run) == lock:
        time.sleep(0.01)


def _lock(run: Run) -> str:
    """What the run's lock says of the process that trains; empty if there is none yet."""
    found = list((run.folder / "output").glob("p/*/.run_lock"))
    return found[0].read_text() if found else ""


def _family(pid: int) -> Iterator[int]:
    """A process, its children, and theirs."""
    yield pid
    with suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from _family(int(child))


def _is_of(pid: int, run: Run) -> bool:
    """Whether a process works in the run's folder and is no zombie."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cwd").resolve() == run.folder.resolve()
    return False


def soak_combinations(count: int, seed: int, log: Path) -> list[Result]:
    """Soak `count` combinations. Each result is added to `log`, and those that it has already are not run again."""
    log.parent.mkdir(parents=True, exist_ok=True)
    lines = log.read_text().splitlines() if log.exists() else []
    logged = [Result(**json.loads(line)) for line in lines]
    done = {result.number: result for result in logged if result.case == drawn(seed, result.number)}
    for number in range(count):
        if number in done:
            continue
        with tempfile.TemporaryDirectory() as folder:
            write_data(Path(folder) / "data")
            done[number] = soak_one(seed, number, Path(folder))
        with log.open("a") as file:
            file.write(json.dumps(asdict(done[number])) + "\n")
        if done[number].found:
            print(f"{number}: {described(done[number].case)}: {'; '.join(done[number].found)[:2000]}", flush=True)
    return [done[number] for number in range(count)]


def table(results: Iterable[Result]) -> list[str]:
    """A Markdown table of the results, by ranks, workers and compiling."""
    rows: dict[str, list[Result]] = {}
    for result in results:
        case = result.case
        kind = "two ranks (torchrun)" if world_of(case) == 2 else "one process"
        kind += ", files by workers" if "loader workers" in case.values() and case["data"] == "small_files" else ""
        rows.setdefault(kind + (", compiled" if COMPILED[1] in case.values() else ""), []).append(result)
    lines = ["| combinations of modes | runs | SIGKILL | SIGTERM to the group | failed |", "|---|---:|---:|---:|---:|"]
    for kind, own in sorted(rows.items()):
        kills = [sum(result.kills[name] for result in own) for name in SIGNALS]
        lines.append(f"| {kind} | {len(own)} | {kills[0]} | {kills[1]} | {sum(bool(result.found) for result in own)} |")
    return lines
