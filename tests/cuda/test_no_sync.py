"""After the first epoch no step makes the host wait for the GPU, except where each epoch begins."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from mdistiller.distillers import distiller_dict
from mdistiller.engine.lr_schedule import adjust_learning_rate
from mdistiller.engine.meters import Meters

from ..reliability.alone import within
from ._runs import AUTO, NEVER, STEPS, built
from .conftest import no_waiting

# Methods whose loss waits itself, and why.
WAITS = {"KDSVD": "torch.linalg.eigh reads whether it has converged"}
# The first two steps of an epoch read the sums of the frozen networks' weights.
FIRST = 2


@pytest.mark.parametrize("graph", [NEVER, AUTO], ids=["eager", "auto"])
@pytest.mark.parametrize("method", sorted(distiller_dict))
def test_no_step_waits_for_the_gpu(
    method: str, graph: dict[str, str], device: torch.device, shared: Path, registered: None
) -> None:
    """The short last batch neither. torch names the place in its error."""
    refused = device if method not in WAITS else torch.device("cpu")
    with within(shared / f"{method} {next(iter(graph.values()))} waits"):
        trainer = built(method, {**graph, "SOLVER.EMA": 0.9, "SOLVER.CLIP_GRAD_NORM": 1.0}, device)
        trainer.distiller.train()
        meters, recent = Meters(), Meters()
        for epoch in (1, 2, 3):
            trainer.train_loader.set_epoch(epoch)
            for number, batch in enumerate(trainer.train_loader, start=1):
                with no_waiting(refused) if epoch > 1 and number > FIRST else nullcontext():
                    adjust_learning_rate(epoch, trainer.cfg, trainer.optimizer, number - 1, STEPS)
                    fields = trainer.prepare_batch(batch, epoch)
                    trainer.train_iter(fields, epoch, meters, recent, number, measure=True)
            assert number == STEPS
    assert all(abs(mean) < float("inf") for mean in meters.means().values())
