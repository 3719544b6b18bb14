#!/usr/bin/env python
"""Make one HTML page of a run, or of a plan's table: figures, curves, pictures, configuration, environment.

    python tools/report.py output/digits/kd,wrn_16_2,resnet8
    python tools/report.py output/plan_digits -o digits.html

The page holds all it shows; it can be sent to somebody. Pictures of a run's insides are in it once
tools/inspect_features.py --run has drawn them.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mdistiller.analysis.html_report import report
from mdistiller.console import one_line_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, metavar="RUN|TABLE", help="a run's folder, or that of a table")
    parser.add_argument("-o", "--out", type=Path, help="the page's file (default: report.html in that folder)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with one_line_errors():
        page = report(args.path)
        out = args.out or (args.path.parent if args.path.is_file() else args.path) / "report.html"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
