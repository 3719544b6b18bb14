"""The device that a run computes on: its choice, its kernels, its memory."""

from __future__ import annotations

import os

import torch

from ...errors import UserError
from ...system import peak_memory as peak_memory_of_process


def pick_device(name: str = "auto") -> torch.device:
    """The torch device that `name` means: "auto" is CUDA if available, else the CPU.

    Raises:
        UserError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} is not available ({reason}); try EXPERIMENT.DEVICE cpu") from None
    return device


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
