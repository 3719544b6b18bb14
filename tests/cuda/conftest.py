"""What the tests of this folder share: the device, exact arithmetic, and a record of results that outlives a kill.

They run on CUDA and skip where there is none. MDISTILLER_TEST_DEVICE=cpu runs them on the CPU, as a rehearsal.
"""

from __future__ import annotations

import json
import os
import warnings

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, before its first operation

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch

from mdistiller.engine.graph.recorder import refusing_to_wait

from ..reliability import small
from ..reliability.conftest import registered  # noqa: F401  # a fixture of these tests too

NAME = os.environ.get("MDISTILLER_TEST_DEVICE", "cuda")
HERE = Path(__file__).parent
# The most important files first: time may be short.
ORDER = ("methods", "graph", "no_sync", "modes", "data", "resume", "digits", "nan", "compiled")


class Results:
    """Appends each test's result to the file MDISTILLER_TEST_RESULTS, one line of JSON each, as soon as it is known."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.warnings: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        outcome = "error" if report.when != "call" and report.failed else report.outcome
        said = ", ".join(f"{key}: {value}" for key, value in report.user_properties) if report.passed else ""
        self._write(report.nodeid, outcome, report.duration, why(report) or said)

    def pytest_warning_recorded(self, warning_message: warnings.WarningMessage, nodeid: str) -> None:
        """Each message once, with the first test that it came from."""
        text = " ".join(f"{warning_message.category.__name__}: {warning_message.message}".split())[:500]
        if text not in self.warnings:
            self.warnings.add(text)
            self._write(nodeid, "warning", 0.0, text)

    def _write(self, test: str, outcome: str, seconds: float, why: str) -> None:
        line = {"test": test, "outcome": outcome, "seconds": seconds, "why": why}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(line)}\n")


def why(report: pytest.TestReport) -> str:
    """The line that says what is wrong, or why it was skipped; empty if it passed."""
    if report.passed:
        return ""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    return " ".join(str(crash.message if crash else report.longrepr).split())[:500]


def pytest_configure(config: pytest.Config) -> None:
    path = os.environ.get("MDISTILLER_TEST_RESULTS")
    if path and not hasattr(config, "workerinput"):  # with xdist, its main process hears of every result
        config.pluginmanager.register(Results(Path(path)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those of this folder in `ORDER`, among themselves."""
    own = [place for place, item in enumerate(items) if HERE in item.path.parents]
    rank = {f"test_{name}": place for place, name in enumerate(ORDER)}
    ordered = sorted((items[place] for place in own), key=lambda item: rank[item.path.stem])
    for place, item in zip(own, ordered):
        items[place] = item
        # What torch and the driver warn of on a GPU nobody has seen before: it is reported, and fails nothing.
        item.add_marker(pytest.mark.filterwarnings("default"), append=False)


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The device under test, with arithmetic that does not round to TF32."""
    if NAME.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a GPU; MDISTILLER_TEST_DEVICE=cpu rehearses this on the CPU")
    found = torch.device(NAME)
    if found.type == "cuda":
        _end_if_broken()
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    yield found
    torch.use_deterministic_algorithms(False)
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before
    if found.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")


def _end_if_broken() -> None:
    """End this process if a test before has broken its CUDA context, in which every further one would fail."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(70)  # xdist names this test, and starts another worker
        pytest.exit(f"the CUDA context is broken: {error}", returncode=70)


@pytest.fixture
def graphs(device: torch.device) -> torch.device:
    """The device, which must have CUDA graphs."""
    if device.type != "cuda":
        pytest.skip("a CUDA graph needs a GPU")
    return device


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the `data` of small.py."""
    folder = tmp_path_factory.mktemp("cuda")
    small.write_data(folder / "data")
    return folder


def no_waiting(device: torch.device) -> AbstractContextManager[None]:
    """Within it, whatever makes the host wait for the GPU raises a RuntimeError; nothing on a CPU."""
    return refusing_to_wait() if device.type == "cuda" else nullcontext()
