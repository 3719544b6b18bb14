"""What one training step asks of its device: launches, kernels, waits of the host; on a CPU, operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# Calls of the driver's and the runtime's interfaces, by the start of their names; Triton launches by the former.
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cuGraphLaunch")
# Not cudaDeviceSynchronize: the profiler calls it itself.
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cuStreamSynchronize", "cuEventSynchronize")


def profiled(step: Callable[[], None], steps: int, device: torch.device) -> Any:
    """The profiler's record of `steps` calls of `step`, and of nothing before or after them."""
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    if gpu:
        torch.cuda.synchronize(device)
    with profile(activities=activities, profile_memory=not gpu) as record:
        for _ in range(steps):
            step()
        if gpu:
            torch.cuda.synchronize(device)
    return record


def counts(record: Any, steps: int, device: torch.device) -> dict[str, float]:
    """Means over the steps: "launches", "kernels", "synchronisations"; on the CPU "operations", those that others call
    not counted."""
    if device.type != "cuda":
        return {"operations": sum(map(_is_outermost, record.events())) / steps}
    of_host = {event.key: event.count for event in record.key_averages()}
    return {
        "launches": sum(n for key, n in of_host.items() if key.startswith(LAUNCHES)) / steps,
        "kernels": sum(row["count"] for row in kernels(record, steps)),
        "synchronisations": sum(n for key, n in of_host.items() if key.startswith(WAITS)) / steps,
    }


def allocated_mebibytes(record: Any) -> float:
    """The most memory that was held at once of what was allocated within a record on the CPU, in MiB."""
    held = peak = 0
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def kernels(record: Any, steps: int) -> list[dict[str, Any]]:
    """What ran on the GPU, copies and fills included: name, count and milliseconds a step, the longest first."""
    events = record.key_averages()
    # Marks that torch puts around kernels, such as "Optimizer.step", are events of both.
    marks = {event.key for event in events if not _of_gpu(event)}
    rows = [
        {"name": event.key, "count": event.count / steps, "milliseconds": _device_time(event) / 1000 / steps}
        for event in events
        if _of_gpu(event) and event.key not in marks
    ]
    return sorted(rows, key=lambda row: -row["milliseconds"])


def operations(record: Any, steps: int) -> list[dict[str, Any]]:
    """The same of the CPU's operations, each without those that it calls."""
    rows = [
        {"name": e.key, "count": e.count / steps, "milliseconds": e.self_cpu_time_total / 1000 / steps}
        for e in record.key_averages()
    ]
    return sorted(rows, key=lambda row: -row["milliseconds"])


def _of_gpu(event: Any) -> bool:
    return "CUDA" in str(event.device_type)


def _device_time(event: Any) -> float:
    """Microseconds on the GPU. Torch has renamed it."""
    return event.self_device_time_total if hasattr(event, "self_device_time_total") else event.self_cuda_time_total


def _is_outermost(event: Any) -> bool:
    """Whether no other operation calls this one. Around those of the backward pass is autograd, which is none."""
    parent = event.cpu_parent
    while parent is not None and not parent.name.startswith("aten::"):
        parent = parent.cpu_parent
    return event.name.startswith("aten::") and parent is None
