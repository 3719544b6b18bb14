"""Write the plain head of a DCGD student as a checkpoint of the plain network, such as resnet20.

    mdistiller export-head output/cifar100_baselines/dcgd_kd,res56,res20/student_best_single -o resnet20.pth
    mdistiller export-head student_best -m resnet8 -d digits -o resnet8.pth
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from yacs.config import CfgNode as CN

from ..arguments import PathArgument
from ..console import tool
from ..dataset import info_of
from ..engine.cfg import load_cfg, settings_for
from ..engine.files.checkpoint import description_of, load_checkpoint, load_state, model_state, save_checkpoint
from ..engine.networks import Named, fresh
from ..errors import UserError
from ..models.grouped import published_students
from ..user_files import writing
from ._arguments import command_parser

PREFIX = "base."


def export_head(ckpt: Path, out: Path, model: str | None = None, dataset: str | None = None) -> str:
    """Write the plain head in the grouped student's checkpoint `ckpt` to `out`, as a checkpoint of the network `model`.

    Args:
        model: the plain network's name; None: DISTILLER.STUDENT in the run's config.yaml, next to `ckpt`.
        dataset: its data set; None: DATASET.TYPE in that config.yaml, else cifar100.

    Returns:
        What was written, for the terminal.

    Raises:
        UserError: no such file, no grouped student in it, an unknown network, one that does not fit, or one of the
            published students, whose plain head is not an ordinary ResNet.
    """
    content = load_checkpoint(ckpt)
    grouped = model_state(content, ckpt)
    run = _run_of(ckpt)
    run_model = None if run is None else run.DISTILLER.STUDENT
    model = model or run_model
    if model is None:
        raise UserError(f"no config.yaml next to {ckpt} names its network; give the plain one, such as -m resnet20")
    published = next((name for name in (model, run_model) if name in published_students), None)
    if published:
        raise UserError(
            f"the plain head of {published} is not an ordinary ResNet: as published, it has no ReLU after its stem; "
            f"score it with tools/eval.py -m {published} --head single, or train with DISTILLER.STUDENT "
            f"resnet{published.rsplit('r', 1)[1]} and DCGD.GROUPS, whose head can be exported"
        )
    state = {name.removeprefix(PREFIX): tensor for name, tensor in grouped.items() if name.startswith(PREFIX)}
    if not state:
        raise UserError(f"{ckpt} holds no grouped student (no entry begins with {PREFIX!r})")
    if run is None or dataset not in (None, run.DATASET.TYPE):
        run = settings_for(dataset or "cifar100", model=model)
    info = info_of(run)
    named = Named(model, info.model_family, info.num_classes, info.image_size)
    load_state(fresh(named), state, ckpt)
    with writing(out):
        save_checkpoint({"model": state, **description_of(content)}, out)
    return f"wrote {out}; score it with tools/eval.py -m {model} -d {run.DATASET.TYPE} -c {out}"


def _run_of(ckpt: Path) -> CN | None:
    """The settings in the config.yaml next to `ckpt`; None if it cannot be read, or is of a version without them."""
    source = ckpt.parent / "config.yaml"
    try:
        return load_cfg(source) if os.path.isfile(source) else None
    except UserError:
        return None


def parse_args(arguments: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = command_parser(__doc__, prog)
    parser.add_argument(
        "ckpt", action=PathArgument, type=Path,
        help="a grouped student's checkpoint: student_best_single, student_latest, best, ...",
    )  # fmt: skip
    parser.add_argument("-o", "--out", action=PathArgument, type=Path, required=True, help="the file to write")
    parser.add_argument("-m", "--model", help="the plain network (default: from config.yaml next to the checkpoint)")
    parser.add_argument("-d", "--dataset", help="its data set (default: from that config.yaml, else cifar100)")
    return parser.parse_args(arguments)


@tool()
def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    print(export_head(**vars(parse_args(arguments, prog))))
