"""The record of a run's environment: what one needs to know to repeat it."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from yacs.config import CfgNode as CN

from ... import __version__
from ..files.atomic import write_whole


def record_run(folder: Path, cfg: CN, **facts: Any) -> None:
    """Write config.yaml and environment.json into a run's `folder`: what one needs to repeat it.

    Args:
        facts: further entries of environment.json.

    Raises:
        SaveError: one of them cannot be written.
    """
    write_whole(cfg.dump().encode(), folder / "config.yaml")
    record = json.dumps({"seed": cfg.EXPERIMENT.SEED, **facts, **describe_run()}, indent=2)
    write_whole(f"{record}\n".encode(), folder / "environment.json")


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
