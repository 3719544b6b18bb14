"""Network weights as safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from .atomic import write_whole
from .checksum import tensors_digest
from .description import to_metadata

SUFFIX = ".safetensors"


def write_safetensors(state: Mapping[str, Tensor], path: Path, marks: Mapping[str, Any] | None = None) -> None:
    """Write tensors to `path` atomically, with a checksum and `marks` in the file's metadata.

    Args:
        marks: what a checkpoint holds beside the weights: its marks and `described`; what is no text becomes JSON.

    Raises:
        SaveError: disk full, quota, read-only or vanished folder.
    """
    # Copies, because the format does not allow tensors that share memory.
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
    write_whole(save(tensors, {**to_metadata(marks or {}), "format": "pt", "sha256": tensors_digest(tensors)}), path)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors in `path`, on the CPU, and its metadata; checked if the file has our checksum.

    Raises:
        ValueError, or any exception of safetensors: damaged, or not in this format.
    """
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        metadata = file.metadata() or {}
    expected = metadata.get("sha256")
    if expected and expected != tensors_digest(tensors):
        raise ValueError("its checksum does not match")
    return tensors, metadata
