#!/usr/bin/env python
"""Time of DCGD's branches, one after the other and as one wide network: forward and backward, at batch 64.

    python benchmarks/branches.py
    python benchmarks/branches.py --student resnet32 --device cuda --json

The two alternate, so that both see the same machine load; times are medians. Kernels, which a GPU launches for one
step, are counted, not timed. tests/models/test_grouped.py checks that both compute the same.

Measured on two cores of an AMD EPYC (Zen 4) with torch 2.15, 2026-11-23, nothing else running: resnet20, five branches:
loop 189.9 ms and 360 kernels, together 236.1 ms and 163 kernels, together is 0.80 times as fast. No GPU was available.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mdistiller.engine.runtime.device import pick_device
from mdistiller.grouping import published_groups
from mdistiller.models import GroupedStudent, build_model, cifar_model_dict


class CountKernels(TorchDispatchMode):
    """Counts the operators that compute; views launch no kernel."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def step(student: GroupedStudent, features: dict, mode: str) -> None:
    """Forward and backward of the branches and their heads."""
    student.set_branch_mode(mode)
    student.forward_grouped(features).square().mean().backward()


def seconds(student: GroupedStudent, features: dict, mode: str) -> float:
    """Wall time of one step."""
    student.zero_grad(set_to_none=True)
    wait = torch.cuda.synchronize if features["feats"][-2].is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    step(student, features, mode)
    wait()
    return time.perf_counter() - start


def kernels(student: GroupedStudent, features: dict, mode: str) -> int:
    """The kernels that a GPU would launch for one step, counted on the CPU."""
    student.zero_grad(set_to_none=True)
    with CountKernels() as counter:
        step(student, features, mode)
    return counter.count


def measure(student_name: str, batch: int, repeats: int, device: torch.device) -> dict:
    """Medians in milliseconds, their ratio, and the kernels of each mode."""
    torch.manual_seed(0)
    student = GroupedStudent(build_model(cifar_model_dict, student_name, 100), published_groups("res56"))
    student.to(device, memory_format=torch.channels_last)  # as the trainer does
    image = torch.randn(batch, 3, 32, 32, device=device)
    with torch.no_grad():
        trunk = student.base.forward_trunk(image)[0][-1]
    features = {"feats": [trunk.requires_grad_(), None]}
    times: dict[str, list[float]] = {"loop": [], "together": []}
    for _ in range(3 + repeats):
        for mode, taken in times.items():
            taken.append(seconds(student, features, mode))
    medians = {mode: 1000 * statistics.median(taken[3:]) for mode, taken in times.items()}
    student.cpu()
    features = {"feats": [trunk.detach().cpu().requires_grad_(), None]}
    return {
        "student": student_name,
        "batch": batch,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "milliseconds": medians,
        "ratio": medians["loop"] / medians["together"],
        "kernels": {mode: kernels(student, features, mode) for mode in times},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="resnet20")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = measure(args.student, args.batch, args.repeats, pick_device(args.device))
    if args.json:
        print(json.dumps(result))
        return
    print(f"{result['student']}, 5 branches, batch {result['batch']}, {result['device']}, {result['threads']} threads")
    for mode in ("loop", "together"):
        print(f"{mode:9} {result['milliseconds'][mode]:8.1f} ms {result['kernels'][mode]:6} kernels")
    print(f"together is {result['ratio']:.2f} times as fast")


if __name__ == "__main__":
    main()
