"""The record of a run's environment: what one needs to know to repeat it."""

from __future__ import annotations

import json
import os
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


def record_run(folder: Path, cfg: CN, device: str, **facts: Any) -> None:
    """Write config.yaml and environment.json into a run's `folder`: what one needs to repeat it.

    Args:
        device: on which the run computes, such as "cuda:1".
        facts: further entries of environment.json.

    Raises:
        SaveError: one of them cannot be written.
    """
    write_whole(cfg.dump().encode(), folder / "config.yaml")
    record = json.dumps({"seed": cfg.EXPERIMENT.SEED, "device": device, **facts, **describe_run(device)}, indent=2)
    write_whole(f"{record}\n".encode(), folder / "environment.json")


def describe_run(device: str) -> dict[str, Any]:
    """What one needs to know to repeat a run on `device`: command, versions, hardware and the code's commit."""
    return {
        "command": " ".join(sys.argv),
        "mdistiller": __version__,
        "git_commit": commit_of(Path(__file__)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def commit_of(source: Path) -> str | None:
    """The commit of the repository that tracks the file `source`, with "-dirty" if something there has changed.

    None if there is none: a repository that merely encloses it, as one does a virtual environment's packages, says
    nothing of it.
    """
    source = source.resolve()
    if _git(source.parent, "ls-files", "--error-unmatch", source.name) is None:
        return None
    return _git(source.parent, "describe", "--always", "--dirty", "--abbrev=40")


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, run in `folder`; None if it fails or prints nothing."""
    # Within a hook of git, such variables name another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        found = subprocess.run(
            ["git", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None
