"""A recorder of steps that needs no GPU. As in a CUDA graph, operations, numbers and addresses are fixed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from mdistiller.engine import optimizers, trainer

# What makes the host wait for a GPU.
READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
}


class NoReads(TorchDispatchMode):
    """Refuses what makes the host wait."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in READS:
            raise RuntimeError(f"called a synchronizing operation: {function}")
        return function(*args, **(kwargs or {}))


class TracingRecorder:
    """Traces a function by `make_fx`. The run's tensors stand in the trace as themselves, so a replay changes them.

    Unlike a GPU's, it also takes the step that it records.

    Attributes:
        recorded: number of functions recorded.
        operations: of the last one.
    """

    def __init__(self) -> None:
        self.recorded = self.operations = 0

    def rehearse(self, function: Callable[[], None]) -> None:
        with NoReads():
            function()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        def traced(anchor):
            function()
            return anchor

        graph = make_fx(traced, tracing_mode="real")(torch.zeros(()))
        self.recorded += 1
        self.operations = len(graph.graph.nodes)

        @torch.no_grad()
        def replay():
            graph(torch.zeros(()))

        return replay


@pytest.fixture
def recording(monkeypatch):
    """A recorder that stands in for a GPU's, in every trainer that is built. Optimizers are fused, as on a GPU."""
    own = TracingRecorder()

    def recorder_for(device, cfg, obstacle):
        return None if cfg.SOLVER.CUDA_GRAPH == "never" or (obstacle and "no GPU" not in obstacle) else own

    monkeypatch.setattr(trainer, "recorder_for", recorder_for)
    monkeypatch.setattr(optimizers, "_fused", lambda groups: True)
    return own
