"""Short runs in every mode of the engine: on the device as on the CPU, and graphed as eager."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mdistiller.engine.modes import MODES, Mode

from ..reliability.alone import within
from ..reliability.combinations import refused
from ._runs import AUTO, NEVER, built, losses, trained

# They need several processes, or minutes (test_compiled.py).
APART = ("several ranks", "BatchNorm over all ranks", "compiled")
FROM_FILES = {"DATASET.TYPE": "small_files"}
EVERY_MODE = pytest.mark.parametrize(
    "mode", [mode for mode in MODES if mode.name not in APART], ids=lambda mode: mode.name
)
# Python 3.12 and later warn of fork() in a process with threads; torch's workers do just that.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def run_of(mode: Mode) -> tuple[str, dict[str, Any]]:
    """A method that goes with the mode, and the mode's settings."""
    method = next(name for name in ("KD", "AT") if not refused({"method": name, mode.name: mode.name}))
    return method, {**mode.settings, **(FROM_FILES if "images skipped" in mode.name or "workers" in mode.name else {})}


def tolerance(mode: Mode) -> float:
    """Of the losses, relative: half precision rounds differently on each device."""
    return 0.05 if "SOLVER.AMP" in mode.settings else 0.01


@EVERY_MODE
def test_a_mode_trains_as_on_the_cpu(mode: Mode, device: torch.device, shared: Path, registered: None) -> None:
    method, settings = run_of(mode)
    here = trained(method, settings, torch.device("cpu"), shared / f"{mode.name} cpu")
    there = trained(method, {**settings, **NEVER}, device, shared / f"{mode.name} eager")
    assert losses(there) == pytest.approx(losses(here), rel=tolerance(mode), abs=1e-4)
    assert all(weight.isfinite().all() for weight in there.weights.values())


@EVERY_MODE
def test_a_mode_ends_as_without_a_graph(
    mode: Mode, graphs: torch.device, shared: Path, registered: None, record_property: Callable[[str, object], None]
) -> None:
    """With "auto", which takes a graph where it can; the results say whether it did."""
    method, settings = run_of(mode)
    eager = trained(method, {**settings, **NEVER}, graphs, shared / f"{mode.name} never")
    graphed = trained(method, {**settings, **AUTO}, graphs, shared / f"{mode.name} auto")
    record_property("recorded as a graph", graphed.recorded)
    assert losses(graphed) == pytest.approx(losses(eager), rel=tolerance(mode) / 10, abs=1e-5)


def test_a_second_run_reads_the_teacher_s_outputs_and_ends_as_the_first(
    device: torch.device, shared: Path, registered: None
) -> None:
    settings = {"DISTILLER.TEACHER_CACHE": str(shared / "teacher outputs"), "DISTILLER.TEACHER_CACHE_DTYPE": "fp32"}
    without = trained("KD", {}, device, shared / "no cache")
    first, second = (trained("KD", settings, device, shared / f"cache {number}") for number in (1, 2))
    assert losses(first) == pytest.approx(losses(without), rel=1e-3) and losses(second) == pytest.approx(
        losses(first), rel=1e-3
    )
    (metrics,) = (shared / "cache 2").glob("output/p/*/metrics.csv")
    with metrics.open(newline="") as file:
        assert [float(row["teacher_cache_hits"]) for row in csv.DictReader(file)] == [100.0] * 3


def test_fp16_halves_a_scale_that_overflows_and_leaves_the_weights(
    device: torch.device, shared: Path, registered: None
) -> None:
    with within(shared / "scale"):
        trainer = built("KD", {"SOLVER.AMP": "fp16", "SOLVER.EPOCHS": 1}, device)
        scaler = trainer.update.scaler
        assert scaler is not None
        before = {name: p.detach().clone() for name, p in trainer.distiller.student.named_parameters()}
        scaler.scale(torch.ones((), device=device))  # which makes its tensor
        scaler.update(new_scale=2.0**100)
        trainer.train()
    assert 0 < scaler.get_scale() < 2.0**100
    assert all(torch.equal(p, before[name]) for name, p in trainer.distiller.student.named_parameters())
