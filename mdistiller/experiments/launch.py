"""Carry out the runs of a plan: each a process of tools/train.py, several at a time, here or on a Ray cluster."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from queue import SimpleQueue
from typing import Any

import torch
from yacs.config import CfgNode as CN

from ..console import one_line
from ..engine.run_name import is_machine_key
from ..errors import UserError
from .plan import REPOSITORY, Job
from .processes import Processes, Task, run_task
from .runs import Run, read_run

LOG = "train.log"


def finished_run(job: Job) -> Run | None:
    """The job's run, when it has been trained to its end; None when there is still something to do.

    Raises:
        UserError: the folder holds a run of another configuration.
    """
    try:
        run = read_run(job.folder)
    except UserError:
        return None
    here, planned = _flat(run.cfg), _flat(job.cfg)
    for key, value in planned.items():
        if here.get(key) != value and not is_machine_key(key):
            raise UserError(
                f"{job.folder} holds a run with {key} {here.get(key)!r} where the plan says {value!r}; "
                "move it away or mend the plan"
            )
    return run if run.finished else None


def _flat(cfg: CN, above: str = "") -> dict[str, Any]:
    """{"SOLVER.LR": 0.05, ...}"""
    flat: dict[str, Any] = {}
    for key, value in cfg.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, CN) else {f"{above}{key}": value}
    return flat


def task(job: Job) -> Task:
    """tools/train.py for this job; going on from `latest` where there is one."""
    resume = ["--resume"] if (job.folder / "latest").exists() else []
    command = [sys.executable, str(REPOSITORY / "tools/train.py"), "--cfg", str(job.config), *resume, *job.overrides]
    return Task(command, os.getcwd(), {}, (job.folder / LOG).absolute())


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named:
        return named.split(",")
    return [str(i) for i in range(torch.cuda.device_count())]


def run_here(jobs: Sequence[Job], workers: int, gpus: Sequence[str]) -> Iterator[tuple[Job, str]]:
    """Run the jobs on this machine, `workers` at a time, the GPUs dealt out in turn.

    Yields:
        Each job as it ends, with what went wrong; empty when nothing did. Left early, it ends what is running.
    """
    processes = Processes()
    places: SimpleQueue[dict[str, str]] = SimpleQueue()
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    for i in range(workers):
        gpu = {"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {}
        places.put({"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads), **gpu})

    def work(job: Job) -> str:
        place = places.get()
        try:
            return processes.run(task(job), place)
        finally:
            places.put(place)

    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(work, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            for future in futures:
                future.cancel()
            processes.end()


def run_on_ray(jobs: Sequence[Job], address: str) -> Iterator[tuple[Job, str]]:
    """Run the jobs on a Ray cluster, a GPU each where it has GPUs, else a processor each. As `run_here` yields.

    The repository, the data and the output must be at the same place on every machine.

    Args:
        address: as `ray.init` takes it: "auto", "host:port", "ray://..."; "local" starts one here.

    Raises:
        UserError: Ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray
    except ImportError:
        raise UserError("--ray needs Ray: pip install -e '.[ray]'") from None
    try:
        path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
        started: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
        environment = {"env_vars": {"PYTHONPATH": path}}
        ray.init(address, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR, **started)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"no Ray cluster at {address}: {one_line(error, 200)}") from None
    try:
        gpu = 1 if ray.cluster_resources().get("GPU") else 0
        remote = ray.remote(num_cpus=1, num_gpus=gpu, max_retries=0)(run_task)
        waiting = {remote.remote(task(job)): job for job in jobs}
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            job = waiting.pop(done)
            try:
                said = ray.get(done)
            except ray.exceptions.RayError as error:  # the machine was lost, or ran out of memory
                said = one_line(error, 200)
            yield job, said
    finally:
        ray.shutdown()
