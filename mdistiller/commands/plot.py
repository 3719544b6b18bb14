"""Draw the curves of one or more runs: accuracy and every loss term by epoch, as PNG and SVG.

    mdistiller plot output/digits/kd,wrn_16_2,resnet8
    mdistiller plot KD=output/digits/kd,wrn_16_2,resnet8 DKD=output/digits/dkd,wrn_16_2,resnet8 -o output/curves

Without -o the plots of one run go into its folder, those of several runs to output/curves.png and .svg.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..analysis.plots.curves import draw_curves
from ..arguments import PathArgument
from ..console import tool
from ..experiments.runs import read_runs
from ..user_files import writing
from ._arguments import command_parser


def parse_args(arguments: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = command_parser(__doc__, prog)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or LABEL=FOLDER")
    parser.add_argument(
        "-o", "--out", action=PathArgument, type=Path,
        help="the file to write; without the suffix .png or .svg, both are written",
    )  # fmt: skip
    return parser.parse_args(arguments)


@tool()
def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    args = parse_args(arguments, prog)
    runs = read_runs(args.runs)
    alone = next(iter(runs.values())).folder
    out = args.out or (alone if len(runs) == 1 else Path("output")) / "curves"
    paths = [out] if out.suffix in (".png", ".svg") else [Path(f"{out}.png"), Path(f"{out}.svg")]
    for path in paths:
        with writing(path):
            draw_curves(runs, path)
    print("wrote", " and ".join(map(str, paths)))
