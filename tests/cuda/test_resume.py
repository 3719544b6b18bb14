"""Under EXPERIMENT.DETERMINISTIC a run that stops and resumes ends with the bits of one that does not."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
import torch

from mdistiller.distillers import distiller_dict
from mdistiller.distributed.ranks import Ranks

from ..reliability.alone import stop_and_resume
from ..reliability.combinations import METHODS
from ._runs import AUTO, NEVER

# One method of each kind also with "auto", which takes a graph where it can.
CASES = [(method, NEVER) for method in sorted(distiller_dict)] + [(method, AUTO) for method in METHODS]


@pytest.mark.parametrize(("method", "graph"), CASES, ids=[f"{m}-{g['SOLVER.CUDA_GRAPH']}" for m, g in CASES])
def test_a_resumed_run_has_the_bits_of_a_whole_one(
    method: str, graph: dict[str, str], device: torch.device, shared: Path, registered: None
) -> None:
    """With a student that draws random numbers on the device."""
    settings = {
        "EXPERIMENT.DEVICE": str(device), "EXPERIMENT.DETERMINISTIC": True, "SOLVER.BATCH_SIZE": 12, "SOLVER.EPOCHS": 2,
        "SOLVER.EMA": 0.9, **graph,
    }  # fmt: skip
    name = f"{method} {next(iter(graph.values()))} resumed"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            found = stop_and_resume(name, method, settings, shared, Ranks())
    except RuntimeError as error:  # docs/reliability.md: such an operation stops the run, and is named
        if "deterministic implementation" not in str(error):
            raise
        pytest.skip(f"refused by torch: {str(error).partition('. ')[0]}")
    assert found == []
