"""SOLVER.CUDA_GRAPH: a step that is recorded and replayed computes what an eager one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mdistiller.distillers import distiller_dict
from mdistiller.engine.meters import Meters
from mdistiller.errors import UserError

from ..reliability.alone import within
from ._runs import ALWAYS, AUTO, NEVER, STEPS, built, losses, trained
from .test_no_sync import WAITS


@pytest.mark.parametrize("method", sorted(distiller_dict))
def test_a_graphed_run_ends_as_an_eager_one(
    method: str, graphs: torch.device, shared: Path, registered: None
) -> None:
    """Over three epochs at three learning rates, each with a short last batch. "always" is refused by `WAITS` alone."""
    eager = trained(method, NEVER, graphs, shared / f"{method} eager")
    refusal = ""
    try:
        graphed = trained(method, ALWAYS, graphs, shared / f"{method} graphed")
    except UserError as error:
        refusal = str(error)
        graphed = trained(method, AUTO, graphs, shared / f"{method} auto")
    assert losses(graphed) == pytest.approx(losses(eager), rel=1e-3, abs=1e-6)
    assert graphed.distance(eager) < 1e-3
    assert graphed.recorded != (method in WAITS), refusal or "it was recorded"


def test_a_step_of_a_full_batch_is_one_launch_of_a_graph(
    graphs: torch.device, shared: Path, registered: None
) -> None:
    with within(shared / "launches"):
        trainer = built("KD", ALWAYS, graphs)
        trainer.distiller.train()
        meters = Meters()
        for epoch in (1, 2):
            trainer.train_loader.set_epoch(epoch)
            for number, batch in enumerate(trainer.train_loader, start=1):
                fields = trainer.prepare_batch(batch, epoch)
                if (epoch, number) != (2, STEPS - 1):
                    trainer.train_iter(fields, epoch, meters, None, number)
                    continue
                torch.cuda.synchronize()
                with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
                    trainer.train_iter(fields, epoch, meters, None, number)
                    torch.cuda.synchronize()
    calls = {event.key: event.count for event in record.key_averages()}
    assert sum(n for key, n in calls.items() if key.startswith(("cudaGraphLaunch", "cuGraphLaunch"))) == 1
    # Beside it, those that fill the graph's inputs and add to the meters.
    beside = sum(n for key, n in calls.items() if key.startswith(("cudaLaunchKernel", "cuLaunchKernel")))
    assert beside < 30, calls
