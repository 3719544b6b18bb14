"""The machine and the moment of a run: its device, its random seeds, and the record of both."""

from __future__ import annotations

import os
import platform
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from ... import __version__
from ...errors import UserError


def pick_device(name: str = "auto") -> torch.device:
    """The torch device that `name` means: "auto" is CUDA where there is one, else the CPU.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} is not to be had here ({reason}); try EXPERIMENT.DEVICE cpu") from None
    return device


def seed_everything(seed: int, epoch: int = 0, rank: int = 0) -> None:
    """Seed Python's, NumPy's and torch's generators from (seed, epoch, rank).

    Called before the networks are built (epoch 0) and at the start of every epoch, so that a resumed run draws what
    an uninterrupted one does.
    """
    words = np.random.SeedSequence((seed, epoch, rank)).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))


def random_state() -> dict[str, Any]:
    """Where the generators that `seed_everything` seeds stand, in tensors and plain containers."""
    numpy = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": {**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].tolist()}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Go on drawing from where `random_state` was taken."""
    random.setstate(state["python"])
    numpy = state["numpy"]
    key = np.array(numpy["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def choose_kernels(deterministic: bool) -> None:
    """On a GPU: kernels that give the same bits every time, or else the fastest for these shapes.

    The processor's are deterministic anyway.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has held so far, in MiB: torch's on a GPU, the whole process's on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # Kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def describe_run(command: list[str] | None = None) -> dict[str, Any]:
    """What one needs to know to repeat a run: command, versions, hardware and the code's commit."""
    cuda = torch.cuda.is_available()
    return {
        "command": " ".join(command if command is not None else sys.argv),
        "mdistiller": __version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _git_commit() -> str | None:
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
