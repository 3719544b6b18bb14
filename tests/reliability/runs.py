"""Tiny runs of tools/train.py that are killed and resumed, and how they differ from uninterrupted runs."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
TOOL = REPOSITORY / "tools" / "train.py"
STEPS = 9  # per epoch, with SETTINGS
# The bits of a sum depend on the number of threads.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
# Columns that differ between any two runs: times, memory, cache hits.
TIMES = {
    "data_time", "step_time", "images_per_second", "epoch_seconds", "peak_memory_mib", "teacher_cache_hits",
}  # fmt: skip

SETTINGS = {
    "EXPERIMENT.PROJECT": "p", "EXPERIMENT.NAME": "run", "EXPERIMENT.DEVICE": "cpu", "LOG.WANDB": "False",
    "DATASET.TYPE": "digits", "DATASET.TRAIN_FRACTION": "0.1", "DATASET.VAL_FRACTION": "0.05",
    "DISTILLER.STUDENT": "resnet8", "DISTILLER.TEACHER": "resnet8", "DISTILLER.TEACHER_CKPT": "teacher",
    "SOLVER.BATCH_SIZE": "16", "SOLVER.EPOCHS": "3", "SOLVER.LR_DECAY_STAGES": "[2]", "LOG.TENSORBOARD_FREQ": "4",
    "LOG.SAVE_CHECKPOINT_ITERS": "3", "LOG.SAVE_CHECKPOINT_FREQ": "2",
}  # fmt: skip
METHODS = {
    "KD": {"DISTILLER.TYPE": "KD", "SOLVER.EMA": "0.9"},
    "CRD": {"DISTILLER.TYPE": "CRD", "SOLVER.TRAINER": "crd", "CRD.NCE.K": "16"},
    "DOT": {"DISTILLER.TYPE": "KD", "SOLVER.TRAINER": "dot"},
}


class Process(Protocol):
    pid: int

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...

    def kill(self) -> None: ...


class Launcher(Protocol):
    def __call__(self, arguments: list[str], folder: Path, output: Path, environment: dict[str, str]) -> Process: ...


def launch(arguments: list[str], folder: Path, output: Path, environment: dict[str, str]) -> Process:
    """Start `python tools/train.py` in a new session."""
    with output.open("a") as out:
        return subprocess.Popen(
            [sys.executable, str(TOOL), *arguments], cwd=folder, stdout=out, stderr=out, start_new_session=True,
            env=os.environ | ONE_THREAD | environment,
        )  # fmt: skip


class Zygote:
    """Starts runs by forking a process that has imported everything; see zygote.py."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.reliability.zygote"], cwd=REPOSITORY, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | ONE_THREAD,
        )  # fmt: skip

    def ask(self, **command: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(command), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def launch(
        self, arguments: list[str], folder: Path, output: Path, environment: dict[str, str], tool: Path = TOOL
    ) -> Process:
        """As `launch` above."""
        return self.start(tool, arguments, folder, output, environment)

    def start(
        self, tool: Path, arguments: list[str], folder: Path, output: Path, environment: dict[str, str]
    ) -> Process:
        words = {"tool": str(tool), "arguments": arguments, "folder": str(folder), "output": str(output)}
        return Forked(self, self.ask(start=words | {"environment": environment}))

    def launch_pair(
        self, arguments: list[str], folder: Path, output: Path, environment: dict[str, str], tool: Path = TOOL
    ) -> Process:
        """Two ranks, as torchrun starts them."""
        with socket.create_server(("127.0.0.1", 0)) as found:
            port = found.getsockname()[1]
        common = environment | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [common | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
        return Pair([self.launch(arguments, folder, output, rank, tool) for rank in ranks])

    def close(self) -> None:
        self.process.communicate("")


@dataclass
class Forked:
    """A process that the zygote started."""

    zygote: Zygote
    pid: int
    status: int | None = None

    def poll(self) -> int | None:
        if self.status is None:
            self.status = self.zygote.ask(poll=self.pid)
        return self.status

    def wait(self) -> int:
        if self.status is None:
            self.status = self.zygote.ask(wait=self.pid)
        assert self.status is not None
        return self.status

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


@dataclass
class Pair:
    """The ranks of one run: it has ended when all have, and its status is the first one that is not 0."""

    ranks: list[Process]

    @property
    def pid(self) -> int:
        return self.ranks[0].pid

    def poll(self) -> int | None:
        statuses = [rank.poll() for rank in self.ranks]
        return None if None in statuses else next(filter(None, statuses), 0)

    def wait(self) -> int:
        return next(filter(None, [rank.wait() for rank in self.ranks]), 0)

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()


@dataclass
class Run:
    """One experiment in its own folder: started, killed, resumed."""

    folder: Path
    settings: dict[str, str]
    launcher: Launcher
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "empty.yaml").touch()
        write_teacher(self.folder / "teacher")
        self.output = self.folder / "output.txt"

    @property
    def log_path(self) -> Path:
        (found,) = (self.folder / "output" / "p").iterdir()
        return found

    def start(self, *more: str) -> Process:
        """Start the run, or resume it if it has a checkpoint."""
        self.stale = self._partial()  # left by an earlier kill
        begun = "--overwrite" not in more and list((self.folder / "output").glob("p/*/latest"))
        settings = [word for pair in (SETTINGS | self.settings).items() for word in pair]
        arguments = ["--cfg", "empty.yaml", *(["--resume"] if begun else []), *more, *settings]
        return self.launcher(arguments, self.folder, self.output, self.environment)

    def finish(self) -> None:
        status = self.start().wait()
        assert status == 0, f"exit status {status}:\n{self.output.read_text()[-3000:]}"

    def begun(self, process: Process) -> bool:
        """Wait until `process` trains; return False if it ends before."""
        while process.poll() is None:
            for lock in (self.folder / "output").glob("p/*/.run_lock"):
                if f'"pid": {process.pid},' in lock.read_text():
                    return True
            time.sleep(0.002)
        return False

    def kill_once(self, seconds: float, stage: str = "") -> str | None:
        """Start, and kill after `seconds` of training, or as soon after that as the run is at `stage`.

        Returns:
            Where the run stood, or None if it ended before.
        """
        process = self.start()
        if self.begun(process):
            until = time.monotonic() + seconds
            while process.poll() is None and (time.monotonic() < until or (stage and stage != self.stage())):
                pass
            process.kill()
        status = process.wait()
        assert status in (0, -signal.SIGKILL), f"exit status {status}:\n{self.output.read_text()[-3000:]}"
        return self.stage() if status else None

    def _partial(self) -> set[tuple[str, int]]:
        """The files that are being written, or were when a kill came."""
        found = set()
        for path in (self.folder / "output").glob("p/*/.*.partial"):
            with suppress(FileNotFoundError):
                found.add((path.name, path.stat().st_ino))
        return found

    def stage(self) -> str:
        """The stage of a run, from its files: saving, steps, validation, or between epochs."""
        if self._partial() - self.stale:
            return "saving"
        latest = list((self.folder / "output").glob("p/*/latest"))
        if not latest:
            return "steps"
        within = torch.load(latest[0], weights_only=True).get("within_epoch")
        if not within:
            return "between epochs"
        return "validation" if within["step"] == STEPS else "steps"


def killed_run(run: Run, moments: random.Random, kills: int, longest: float) -> Counter[str]:
    """Kill `run` up to `kills` times, then let it finish; count the stages at which it was killed.

    Args:
        longest: a kill comes after at most that many seconds of training; in about half of the cases it then waits
            until the run next saves or validates.
    """
    stages: Counter[str] = Counter()
    while stages.total() < kills:
        stage = run.kill_once(moments.uniform(0, longest), moments.choice(["", "", "saving", "validation"]))
        if stage is None:
            break
        stages[stage] += 1
    run.finish()
    return stages


def timed(run: Run) -> float:
    """Let `run` finish; return the seconds since it began to train."""
    process = run.start()
    assert run.begun(process), run.output.read_text()[-3000:]
    before = time.monotonic()
    assert process.wait() == 0, run.output.read_text()[-3000:]
    return time.monotonic() - before


def differences(a: Path, b: Path) -> list[str]:
    """How two finished runs' folders differ, except in times: files, checkpoints (bit for bit), worklog, metrics."""
    names = {path.name for path in a.iterdir()} | {path.name for path in b.iterdir()}
    checkpoints = {name for name in names if not Path(name).suffix and name != "latest_previous"} - {"train.events"}
    found = sorted({path.name for path in a.iterdir()} ^ {path.name for path in b.iterdir()})
    for name in sorted(checkpoints - set(found)):
        contents = (torch.load(folder / name, weights_only=True) for folder in (a, b))
        found += [f"{name}: {where}" for where in unequal(*contents)]
    found += [name for name in ("worklog.txt", "config.yaml") if (a / name).read_bytes() != (b / name).read_bytes()]
    if timeless(a / "metrics.csv") != timeless(b / "metrics.csv"):
        found.append("metrics.csv")
    return found


def timeless(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv without the columns of time and memory."""
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def unequal(a: Any, b: Any, where: str = "") -> list[str]:
    """The keys at which two checkpoints' contents are not equal bit for bit."""
    if type(a) is not type(b):
        return [f"{where} {type(a)} {type(b)}"]
    if isinstance(a, dict):
        if list(a) != list(b):
            return [f"{where} {set(a) ^ set(b) or 'order'}"]
        return [place for key in a for place in unequal(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [where]
        return [place for i, (x, y) in enumerate(zip(a, b)) for place in unequal(x, y, f"{where}/{i}")]
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and _bytes(a) == _bytes(b)
        return [] if same else [where]
    return [] if a == b else [where]


def _bytes(tensor: torch.Tensor) -> bytes:
    """A tensor's bits, wherever it lies; NaN equals NaN."""
    return tensor.cpu().numpy().tobytes()


def write_teacher(path: Path) -> None:
    """Write an untrained resnet8 for ten classes."""
    from .._networks import write_untrained

    write_untrained(path, "resnet8", seed=0)
