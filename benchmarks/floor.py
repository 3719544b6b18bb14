"""The arithmetic floor of a training step: the time that its multiply-accumulates alone would take on this machine.

    floor = rate / (teacher forward + student forward + student backward),   backward = 2 x forward

in images a second; `rate` is the most multiply-accumulates a second that a large convolution reaches on this machine.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.nn.functional as F

from mdistiller.models import build_model, cifar_model_dict
from mdistiller.models.cost import network_cost

# (channels, height and width) of a batch of 64: 2 to 10 GMAC each.
LARGE = ((64, 32), (128, 16), (256, 16), (512, 8))


def convolution_rate(dtype: torch.dtype, device: torch.device, rounds: int = 5) -> float:
    """The highest rate (multiply-accumulates a second) of `rounds` 3x3 convolutions of each size in `LARGE`.

    On a GPU in TF32 if that is on, as a training step is.
    """
    best = 0.0
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=torch.backends.cudnn.allow_tf32):
        for channels, size in LARGE:
            x = torch.randn(64, channels, size, size, device=device, dtype=dtype)
            weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype)
            x, weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
            for _ in range(rounds):
                best = max(best, 64 * size**2 * 9 * channels**2 / _seconds(x, weight))
    return best


def _seconds(x: torch.Tensor, weight: torch.Tensor) -> float:
    """Seconds of one convolution. A GPU takes many in a row: one is over before the host has started the next."""
    wait, count = (torch.cuda.synchronize, 20) if x.is_cuda else (lambda: None, 1)
    wait()
    start = time.perf_counter()
    for _ in range(count):
        F.conv2d(x, weight, padding=1)
    wait()
    return (time.perf_counter() - start) / count


def floor_rate(teacher: str, student: str, rate: float, needs_teacher: bool = True) -> float:
    """Images a second of a step on 32x32 images of 100 classes at `rate` multiply-accumulates a second."""
    macs = {name: network_cost(build_model(cifar_model_dict, name, 100), 32).macs for name in (teacher, student)}
    return rate / (3 * macs[student] + (macs[teacher] if needs_teacher else 0))


def bfloat16_units(device: torch.device) -> bool | None:
    """Whether the device supports bfloat16 in hardware; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return None
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)
