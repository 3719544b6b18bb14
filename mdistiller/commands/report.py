"""Make one HTML page of a run, or of a plan's table: metrics, curves, plots, configuration, environment.

    mdistiller report output/digits/kd,wrn_16_2,resnet8
    mdistiller report output/plan_digits -o digits.html

The page needs no other file, so it can be sent to others. It also shows the plots of tools/inspect_features.py --run,
if that was run before.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from ..analysis.html_report import report
from ..arguments import PathArgument
from ..console import tool
from ..user_files import writing
from ._arguments import command_parser


def parse_args(arguments: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = command_parser(__doc__, prog)
    parser.add_argument(
        "path", action=PathArgument, type=Path, metavar="RUN|TABLE", help="a run's folder, or a table's"
    )
    parser.add_argument(
        "-o", "--out", action=PathArgument, type=Path, help="the page's file (default: report.html in that folder)"
    )
    return parser.parse_args(arguments)


@tool()
def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    args = parse_args(arguments, prog)
    page = report(args.path)
    out = args.out or (args.path.parent if os.path.isfile(args.path) else args.path) / "report.html"
    with writing(out):
        out.write_text(page, encoding="utf-8")
    print(f"wrote {out}")
