"""What a step asks of its device is counted right; a GPU's part on the records that torch's profiler makes of one."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest
import torch

from ._scripts import script


@pytest.fixture(scope="module")
def counting() -> Iterator[ModuleType]:
    with script("counting") as module:
        yield module


def test_operations_that_others_call_are_not_counted(counting: ModuleType) -> None:
    x = torch.ones(2, 3, requires_grad=True)

    def step() -> None:
        torch.nn.functional.linear(x, torch.ones(2, 3)).sum().backward()

    record = counting.profiled(step, 2, torch.device("cpu"))
    # Two of the operations are `linear` and `sum`, which call others; the rest are of ones() and of the backward pass.
    assert 5 <= counting.counts(record, 2, torch.device("cpu"))["operations"] <= 14
    names = [row["name"] for row in counting.operations(record, 2)]
    assert "aten::linear" in names and names == list(dict.fromkeys(names))


def event(key: str, count: int, gpu: bool = False, microseconds: float = 0.0) -> SimpleNamespace:
    return SimpleNamespace(
        key=key, count=count, device_type="DeviceType.CUDA" if gpu else "DeviceType.CPU",
        self_device_time_total=microseconds,
    )  # fmt: skip


def test_launches_kernels_and_waits_of_a_gpu(counting: ModuleType) -> None:
    """Two steps of a graph and of two kernels beside it. What torch itself marks or waits for is no part of them."""
    events = [
        event("cudaGraphLaunch", 2), event("cudaLaunchKernel", 3), event("cuLaunchKernelEx", 1),
        event("cudaMemcpyAsync", 4), event("cudaStreamSynchronize", 5), event("cudaDeviceSynchronize", 2),
        event("Optimizer.step#SGD.step", 2), event("Optimizer.step#SGD.step", 2, True, 900.0),
        event("sm90_conv", 8, True, 3000.0), event("add", 4, True, 5000.0), event("Memcpy HtoD", 2, True, 10.0),
    ]  # fmt: skip
    record = SimpleNamespace(key_averages=lambda: events)
    found = counting.counts(record, 2, torch.device("cuda"))
    assert found == {"launches": 3.0, "kernels": 7.0, "synchronisations": 2.5}
    rows = counting.kernels(record, 2)
    assert [row["name"] for row in rows] == ["add", "sm90_conv", "Memcpy HtoD"]
    assert rows[0] == {"name": "add", "count": 2.0, "milliseconds": 2.5}
