"""Run the jobs of a plan, each as a process of `mdistiller train`, on this machine or on a Ray cluster."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import takewhile
from queue import SimpleQueue
from typing import Any

import torch

from ..console import one_line
from ..errors import UserError
from ..system import usable_cpus
from .jobs import Job, task
from .mps import gpu_environments
from .processes import Processes, package_environment, run_task


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named:
        # CUDA, too, ignores what follows an entry that is none, such as -1.
        return list(takewhile(lambda name: name and name[0] != "-", map(str.strip, named.split(","))))
    return [str(i) for i in range(torch.cuda.device_count())]


def threads_of(job: Job, workers: int) -> dict[str, str]:
    """The environment variables for the job's CPU threads, where `workers` jobs run at a time.

    The bits of a sum depend on the number of threads. So a run with EXPERIMENT.DETERMINISTIC keeps the number that it
    has alone; its threads sleep while they wait, because N runs have N times as many as there are cores. Any other run
    gets its share of the cores.
    """
    if workers == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    if job.cfg.EXPERIMENT.DETERMINISTIC:
        return {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
    return {"OMP_NUM_THREADS": str(max(1, usable_cpus() // workers))}


def run_here(jobs: Sequence[Job], workers: int, gpus: Sequence[str]) -> Generator[tuple[Job, str], None, None]:
    """Run the jobs on this machine, `workers` at a time; worker i uses GPU number i modulo the number of GPUs.

    Yields:
        Each job when it ends, with its error message, which is empty on success. If the iteration stops early, the
        running processes are ended; close the iterator where an exception may keep it.
    """
    processes = Processes()
    on_gpus = sum(job.cfg.EXPERIMENT.DEVICE != "cpu" for job in jobs)
    with gpu_environments(gpus, min(workers, on_gpus)) as environments, ThreadPoolExecutor(workers) as pool:
        places: SimpleQueue[dict[str, str]] = SimpleQueue()
        for i in range(workers):
            places.put(environments[i % len(environments)] if environments else {})

        def work(job: Job) -> str:
            place = places.get()
            try:
                return processes.run(task(job), threads_of(job, workers) | place)
            finally:
                places.put(place)

        futures = {pool.submit(work, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            for future in futures:
                future.cancel()
            processes.end()


def run_on_ray(jobs: Sequence[Job], address: str) -> Generator[tuple[Job, str], None, None]:
    """Run the jobs on a Ray cluster, one on each GPU if it has GPUs, else one on each CPU core; yields like `run_here`.

    The package, the data and the output must have the same paths on every machine.

    Args:
        address: the address for `ray.init`: "auto", "host:port", "ray://..."; "local" starts a cluster on this machine.

    Raises:
        UserError: Ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray
    except ImportError:
        raise UserError("--ray needs Ray: pip install -e '.[ray]'") from None
    try:
        started: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
        environment = {"env_vars": package_environment()}
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
                message = ray.get(done)
            except ray.exceptions.RayError as error:  # the machine was lost, or ran out of memory
                message = one_line(error, 200)
            yield job, message
    finally:
        ray.shutdown()
