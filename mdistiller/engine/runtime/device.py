"""The device that a run computes on: its choice, its kernels, its compiler, its memory."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch

from ...console import one_line, out_of_memory
from ...errors import UserError
from ...system import peak_memory as peak_memory_of_process


def pick_device(name: str = "auto", key: str = "EXPERIMENT.DEVICE") -> torch.device:
    """The torch device that `name` means: "auto" is CUDA if available, else the CPU. `key` is for the message.

    Raises:
        UserError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cpu" and device.index:
            raise RuntimeError("there is one CPU device, for all its cores")
        (torch.ones(1, device=device) + 1).item()  # "meta" has no numbers
    except Exception as error:  # a device's own module may be missing, its driver too old
        if out_of_memory(error):  # other processes have all of it
            raise
        why = one_line(error, 150).partition(". ")[0] or type(error).__name__
        raise UserError(f"device {name!r} is not available ({why}); try {key} cpu") from None
    return device


def check_compiler(device: torch.device) -> None:
    """Refuse to compile (SOLVER.COMPILE) where torch.compile would find no working compiler for the device.

    On the CPU it compiles C++ that includes Python.h; for a GPU, Triton needs a C compiler.

    Raises:
        UserError: says which was tried, and what to install.
    """
    cpu = device.type == "cpu"
    names = ["clang++" if sys.platform == "darwin" else "g++"] if cpu else ["gcc", "clang"]
    variable, language = ("CXX", "C++") if cpu else ("CC", "C")
    tried = [os.environ[variable]] if variable in os.environ else names
    reasons = [_compiler_fault(name, cpu) for name in tried]
    if all(reasons):
        raise UserError(
            f"SOLVER.COMPILE needs a {language} compiler: {'; '.join(reasons)}. Install one (Debian, Ubuntu: apt "
            f"install g++ python3-dev), name it in the environment variable {variable}, or set SOLVER.COMPILE False"
        )


def _compiler_fault(name: str, cpu: bool) -> str:
    """Why the compiler `name` does not compile a small program; empty if it does."""
    flags = [f"-I{sysconfig.get_path('include')}", "-x", "c++"] if cpu else ["-x", "c"]
    program = "#include <Python.h>\n#include <cmath>\n" if cpu else "#include <stdio.h>\n"
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "small.o"
        call = [*(shlex.split(name) or [name]), *flags, "-c", "-", "-o", str(made)]
        try:
            done = subprocess.run(call, input=program, capture_output=True, text=True, timeout=60)
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            return f"{name!r} cannot be run ({getattr(error, 'strerror', None) or one_line(error, 100)})"
        if made.is_file():
            return ""
    lines = [line for line in done.stderr.splitlines() if "error" in line] or ["it is no compiler"]
    return f"{name!r} compiles no small program ({one_line(lines[0], 150)})"


def choose_kernels(deterministic: bool) -> None:
    """On a GPU, use kernels that give the same bits every time, or else the fastest ones for the shapes in use.

    The CPU's kernels are deterministic anyway.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


def peak_memory(device: torch.device) -> float:
    """This process's peak memory so far, in MiB: torch's tensors on a GPU, the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return peak_memory_of_process()
