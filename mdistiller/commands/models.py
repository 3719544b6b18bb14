"""List the networks that can be named, and on request what each costs.

    mdistiller models                                # those of this library
    mdistiller models 'timm/*mobilenet*' --cost      # those of timm, with parameters and multiply-accumulates
    mdistiller models 'resnet*' --cost --classes 10
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from ..console import reason, tool
from ..errors import UserError
from ..models.catalog import create_model, list_models
from ..models.cost import network_cost
from ..models.native import native_input
from ._arguments import command_parser


def model_lines(pattern: str | None, cost: bool = False, classes: int | None = None, size: int = 0) -> Iterator[str]:
    """One line for each network whose name fits `pattern`; None: those of this library.

    Args:
        cost: add parameters and multiply-accumulates for one image.
        classes: number of classes; None: the network's own.
        size: height and width of the image in pixels; 0: those that the network was made for.

    Raises:
        UserError: no network fits.
    """
    names = [name for name in list_models("*") if "/" not in name] if pattern is None else list_models(pattern)
    if not names:
        raise UserError(
            f"no network fits the pattern {pattern!r}; put * where anything may stand, such as '*mobilenet*', and the "
            "source before the name, such as 'timm/*'"
        )
    width = max(map(len, names))
    for name in names:
        yield f"{name:{width}}  {_cost(name, classes, size)}" if cost else name


def _cost(name: str, classes: int | None, size: int) -> str:
    """A network's cost in words, or why there is none."""
    try:
        size = size or native_input(name).size
        return f"{network_cost(create_model(name, classes), size)} at {size}x{size}"
    except Exception as error:  # of thousands of networks, some cannot be built here; the others are listed
        return f"not known: {reason(error)}"


def parse_args(arguments: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = command_parser(__doc__, prog)
    parser.add_argument("pattern", nargs="?", help="of the shell's kind, in quotes; without it: those of this library")
    parser.add_argument("--cost", action="store_true", help="build each one; print parameters and multiply-accumulates")
    parser.add_argument("--classes", type=int, help="with --cost: the number of classes (default: the network's own)")
    parser.add_argument(
        "--image-size", dest="size", type=int, default=0,
        help="with --cost: height and width of the image (default: those that the network was made for)",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    for option, value in (("--classes", args.classes), ("--image-size", args.size or None)):
        if value is not None and value < 1:
            raise UserError(f"{option} must be a whole number >= 1, not {value}")
        if value is not None and not args.cost:
            raise UserError(f"{option} {value} goes with --cost; add --cost, or leave it out")
    return args


@tool()
def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    for line in model_lines(**vars(parse_args(arguments, prog))):
        print(line, flush=True)
