"""Devices and compilers that a machine does not have are refused in one line, before anything is written."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mdistiller.engine.runtime.device import check_compiler, pick_device
from mdistiller.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("name", ["meta", "mps", "xpu", "hpu", "xla", "cuda:99", "cpu:3", "cpuu", "", "cpu:x"])
def test_an_absent_device(name):
    if name == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has it")
    with pytest.raises(UserError, match=r"^device '.*' is not available \(.+\); try EXPERIMENT\.DEVICE cpu$") as error:
        pick_device(name)
    assert "\n" not in str(error.value)


def test_the_cpu():
    assert pick_device("cpu") == torch.device("cpu") and pick_device("cpu:0").type == "cpu"


CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["/bin/false", "true", "no-such-compiler", "", "a\tb"])
def test_a_wrong_compiler(name, monkeypatch):
    monkeypatch.setenv("CXX", name)
    with pytest.raises(UserError, match=r"^SOLVER\.COMPILE needs a C\+\+ compiler: '.*or set SOLVER\.COMPILE False$"):
        check_compiler(CPU)


def test_a_compiler_that_compiles_nothing(tmp_path, monkeypatch):
    """Its headers are missing."""
    fake = tmp_path / "c++"
    fake.write_text("#!/bin/sh\necho 'x.h: fatal error: no math' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    with pytest.raises(UserError, match=r"compiles no small program \(x\.h: fatal error: no math\)"):
        check_compiler(CPU)


def test_a_machine_without_a_compiler(tmp_path):
    """A real process; for a GPU it is the C compiler that is missing."""
    config = REPOSITORY / "configs/digits/vanilla.yaml"
    call = [sys.executable, REPOSITORY / "tools/train.py", "--cfg", config, "SOLVER.COMPILE", "True"]
    more = ["EXPERIMENT.DEVICE", "cpu", "LOG.PREFIX", tmp_path / "output"]
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([*call, *more], env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: SOLVER.COMPILE needs a C++ compiler: ") and done.stderr.count("\n") == 1
    assert "apt install g++" in done.stderr and not (tmp_path / "output").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        with pytest.raises(UserError, match=r"needs a C compiler: 'gcc' cannot be run .*; 'clang' cannot be run"):
            check_compiler(torch.device("cuda"))
