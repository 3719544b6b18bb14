"""Convert a network's weights between torch checkpoints and safetensors; the suffix of the file to write decides.

    mdistiller convert output/digits/kd,wrn_16_2,resnet8/student_best resnet8.safetensors
    mdistiller convert resnet8.safetensors resnet8.pth
    mdistiller convert checkpoint-99.pth.tar averaged.pth --key state_dict_ema

The checkpoints of other trainers are read too, without running anything of them; of several state dicts, --key names
one. Every command that reads a checkpoint also reads .safetensors.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from ..arguments import PathArgument
from ..console import tool
from ..engine.files.checkpoint import found_weights, save_checkpoint
from ..engine.files.safetensors_file import SUFFIX, write_safetensors
from ..errors import UserError
from ._arguments import command_parser


def convert(source: Path, target: Path, key: str = "") -> str:
    """Write the network's weights in `source` to `target`, as safetensors if that ends with .safetensors.

    Args:
        source: any checkpoint that tools/eval.py reads; from the checkpoint of a whole run, the student is written.
        key: the state dict to write where there are several, or the beginning of its names.

    Returns:
        What was written, for the terminal.

    Raises:
        UserError: no such file, no weights in it, or `target` is the same file or cannot be written.
    """
    state, told = found_weights(source, key)
    if os.path.exists(target) and target.samefile(source):
        raise UserError(f"{target} would be written over itself; name another file")
    if target.suffix == SUFFIX:
        write_safetensors(state, target, told)
    else:
        save_checkpoint({"model": state, **told}, target)
    return f"wrote {target}: {len(state)} tensors, {sum(tensor.numel() for tensor in state.values()):,} numbers"


def parse_args(arguments: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = command_parser(__doc__, prog)
    parser.add_argument(
        "source", action=PathArgument, type=Path, help="the checkpoint: student_best, best, a published one, ..."
    )
    parser.add_argument(
        "target", action=PathArgument, type=Path,
        help="the file to write; without the suffix .safetensors, a torch checkpoint",
    )  # fmt: skip
    parser.add_argument(
        "--key", default="",
        help="of several state dicts, the one to write, such as state_dict_ema; or the beginning of its names, such as "
        "teacher",
    )  # fmt: skip
    return parser.parse_args(arguments)


@tool()
def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    print(convert(**vars(parse_args(arguments, prog))))
