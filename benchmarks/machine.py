"""Write the facts of this machine as JSON: `python benchmarks/machine.py --device cuda --out machine.json`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a clone, not installed

import torch
from floor import bfloat16_units

from mdistiller.console import tool
from mdistiller.engine.files.atomic import write_whole
from mdistiller.engine.runtime.device import pick_device
from mdistiller.engine.runtime.environment import describe_run
from mdistiller.system import usable_cpus

# What `nvidia-smi --query-gpu` is asked for.
ASKED = ("driver_version", "clocks.max.sm", "clocks.max.memory", "clocks.sm", "power.limit", "utilization.gpu")
OPTIONAL = ("triton", "xdist", "wandb")


def facts(device: torch.device) -> dict[str, Any]:
    """Versions and hardware; of the GPU, too, if `device` is one."""
    found = describe_run(str(device)) | {
        "cores": usable_cpus(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "bfloat16_units": bfloat16_units(device),
        "packages": {name: importlib.util.find_spec(name) is not None for name in OPTIONAL},
        "compiler": next((name for name in ("gcc", "clang", "c++") if shutil.which(name)), None),
    }
    if device.type == "cuda":
        found |= of_gpu(device)
    return found


def of_gpu(device: torch.device) -> dict[str, Any]:
    """Facts of a GPU, by torch and by its driver."""
    known = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return {
        "gpu": known.name,
        "gpu_memory_gib": total / 2**30,
        "gpu_free_gib": free / 2**30,
        "multiprocessors": known.multi_processor_count,
        "compute_capability": f"{known.major}.{known.minor}",
        "gpus": torch.cuda.device_count(),
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        **by_driver(str(device.index or 0)),
    }


def by_driver(gpu: str) -> dict[str, str]:
    """What the driver's own tool says of a GPU; empty without that tool."""
    call = ["nvidia-smi", "-i", gpu, f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(call, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    cells = [cell.strip() for cell in done.stdout.strip().split(",")]
    return dict(zip(ASKED, cells)) if done.returncode == 0 and len(cells) == len(ASKED) else {}


@tool()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    text = json.dumps(facts(pick_device(args.device, key="--device")), indent=2)
    write_whole(f"{text}\n".encode(), args.out)
    print(text)


if __name__ == "__main__":
    main()
