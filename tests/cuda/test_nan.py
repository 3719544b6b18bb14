"""A loss that is not finite stops a run on the device at the step where it does so on the CPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from mdistiller.engine.nan_watch import NonFiniteLossError

from ._runs import AUTO, NEVER, trained


@pytest.mark.parametrize("graph", [NEVER, AUTO], ids=["eager", "auto"])
def test_the_step_that_is_not_finite_is_named(
    graph: dict[str, str], device: torch.device, shared: Path, registered: None
) -> None:
    """The first step's learning rate makes the second one overflow."""
    named = []
    for where in (torch.device("cpu"), device):
        folder = shared / f"nan {where.type} {next(iter(graph.values()))} {len(named)}"
        with pytest.raises(NonFiniteLossError) as stopped:
            trained("KD", {**graph, "SOLVER.LR": 1e30}, where, folder)
        found = re.search(r"epoch \d+, iteration \d+", str(stopped.value))
        named.append(found and found[0])
    assert named[0] == named[1] == "epoch 1, iteration 2"
