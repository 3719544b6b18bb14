"""A network's weights from one form of file into another."""

from __future__ import annotations

from pathlib import Path

from ..engine.files.checkpoint import load_checkpoint, model_state, save_checkpoint
from ..engine.files.safetensors_file import SUFFIX, write_safetensors
from ..errors import UserError


def convert(source: Path, target: Path) -> str:
    """Write the network's weights in `source` to `target`, as safetensors where that ends with .safetensors.

    Args:
        source: any checkpoint that tools/eval.py takes; of a whole run's, the student is taken.

    Returns:
        What was written, for the terminal.

    Raises:
        UserError: no such file, no weights in it, or `target` is the same file or cannot be written.
    """
    state = model_state(load_checkpoint(source), source)
    if target.exists() and target.samefile(source):
        raise UserError(f"{target} would be written over itself; name another file")
    if target.suffix == SUFFIX:
        write_safetensors(state, target)
    else:
        save_checkpoint({"model": state}, target)
    return f"wrote {target}: {len(state)} tensors, {sum(tensor.numel() for tensor in state.values()):,} numbers"
