"""SOLVER.COMPILE with the device's own kernels, without a CUDA graph and with one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from ._runs import AUTO, NEVER, losses, trained


@pytest.mark.skipif(shutil.which("gcc") is None, reason="torch.compile builds its kernels with a C compiler")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("graph", [NEVER, AUTO], ids=["eager", "auto"])
def test_a_compiled_run_ends_as_the_plain_one(
    graph: dict[str, str], device: torch.device, shared: Path, registered: None
) -> None:
    word = next(iter(graph.values()))
    plain = trained("KD", NEVER, device, shared / f"plain {word}")
    compiled = trained("KD", {**graph, "SOLVER.COMPILE": True}, device, shared / f"compiled {word}")
    assert losses(compiled) == pytest.approx(losses(plain), rel=2e-3, abs=1e-5)
    assert compiled.distance(plain) < 1e-3
