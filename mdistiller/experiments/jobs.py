"""A job: one run of a plan, the process that trains it, and whether it is done."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yacs.config import CfgNode as CN

from ..engine.build import TOLD_BY_DATA
from ..engine.cfg import load_cfg
from ..engine.files.run_folder import resumable_files
from ..engine.overrides import flat_settings
from ..engine.run_name import experiment_name, is_machine_key
from ..errors import UserError
from .processes import Task, package_environment
from .runs import Run, read_run

LOG = "train.log"


@dataclass(frozen=True)
class Job:
    """One run: the arguments of `mdistiller train`, the configuration that results, and the run's folder."""

    label: str
    config: Path
    overrides: tuple[str, ...]
    cfg: CN
    folder: Path


def make_job(label: str, config: Path, overrides: Mapping[str, Any]) -> Job:
    """The job that trains `config` with `overrides`."""
    tokens = tuple(str(item).replace(", ", ",") for pair in overrides.items() for item in pair)
    cfg = load_cfg(config, tokens)
    return Job(label, config, tokens, cfg, Path(cfg.LOG.PREFIX) / experiment_name(cfg, tokens))


def finished_run(job: Job) -> Run | None:
    """The job's run if all of its epochs are trained, else None.

    Raises:
        UserError: the folder holds a run with another configuration.
    """
    try:
        run = read_run(job.folder)
    except UserError:
        return None
    found, planned = flat_settings(run.cfg), flat_settings(job.cfg)
    for key, value in planned.items():
        told = key in TOLD_BY_DATA and not value  # the plan leaves it to the data, and the run holds what that told
        if found.get(key) != value and not told and not is_machine_key(key):
            raise UserError(
                f"{job.folder} holds a run with {key} {found.get(key)!r} where the plan says {value!r}; "
                "move it away or correct the plan"
            )
    return run if run.finished else None


def task(job: Job) -> Task:
    """The process that trains the job: `mdistiller train`, with --resume if the run has a checkpoint."""
    resume = ["--resume"] if resumable_files(job.folder) else []
    command = [sys.executable, "-m", "mdistiller", "train", "--cfg", str(job.config), *resume, *job.overrides]
    return Task(command, os.getcwd(), package_environment(), (job.folder / LOG).absolute())
