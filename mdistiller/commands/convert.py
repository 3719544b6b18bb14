"""Convert a network's weights between torch checkpoints and safetensors; the suffix of the file to write decides.

    mdistiller convert output/digits/kd,wrn_16_2,resnet8/student_best resnet8.safetensors
    mdistiller convert resnet8.safetensors resnet8.pth
    mdistiller convert checkpoint-99.pth.tar averaged.pth --key state_dict_ema
    mdistiller convert output/.../student_best output/.../student_merged --merge

The checkpoints of other trainers are read too, without running anything of them; of several state dicts, --key names
one. Every command that reads a checkpoint also reads .safetensors. Of a method with layers that can be merged for
inference, as NORM's, --merge writes the merged network; tools/eval.py without -m scores it in the run's folder.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..arguments import PathArgument
from ..console import tool
from ..engine.build import load_deployed
from ..engine.files.checkpoint import (
    DEPLOYED,
    description_of,
    found_weights,
    load_checkpoint,
    marks,
    save_checkpoint,
)
from ..engine.files.safetensors_file import SUFFIX, write_safetensors
from ..engine.files.state_names import without_counters
from ..errors import UserError
from ._arguments import command_parser


def convert(source: Path, target: Path, key: str = "", merge: bool = False) -> str:
    """Write the network's weights in `source` to `target`, as safetensors if that ends with .safetensors.

    Args:
        source: any checkpoint that tools/eval.py reads; from the checkpoint of a whole run, the student is written.
        key: the state dict to write where there are several, or the beginning of its names.
        merge: write the network that the run deploys with its layers merged; config.yaml lies beside `source`.

    Returns:
        What was written, for the terminal.

    Raises:
        UserError: no such file, no weights in it, or `target` is the same file or cannot be written; or nothing can be
            merged.
    """
    state, told = _merged(source, key) if merge else found_weights(source, key)
    if os.path.exists(target) and target.samefile(source):
        raise UserError(f"{target} would be written over itself; name another file")
    if target.suffix == SUFFIX:
        write_safetensors(state, target, told)
    else:
        save_checkpoint({"model": state, **told}, target)
    return f"wrote {target}: {len(state)} tensors, {sum(tensor.numel() for tensor in state.values()):,} numbers"


def _merged(source: Path, key: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As `found_weights`, of the merged network."""
    if key:
        raise UserError(f"--merge takes the network that the run deploys; leave out --key {key}")
    distiller, names, _ = load_deployed(source, "cpu")
    before = distiller.network_to_save(names[0])
    distiller.merge()
    network = distiller.network_to_save(names[0])
    if network is before:
        raise UserError(
            f"{source} holds no layers that can be merged: {type(distiller).__name__} deploys a "
            f"{type(before).__name__} as it is; leave out --merge"
        )
    content = load_checkpoint(source)
    told = {**marks(content), DEPLOYED: type(network).__name__, **description_of(content)}
    return without_counters(network.state_dict()), told


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
    parser.add_argument(
        "--merge", action="store_true",
        help="write the network that the run deploys with the layers merged that can be, as NORM's",
    )  # fmt: skip
    return parser.parse_args(arguments)


@tool()
def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    print(convert(**vars(parse_args(arguments, prog))))
