#!/usr/bin/env python
"""Draw the curves of runs, one or many together: accuracy and every part of the loss by epoch, as PNG and SVG.

    python tools/plot.py output/digits/kd,wrn_16_2,resnet8
    python tools/plot.py KD=output/digits/kd,wrn_16_2,resnet8 DKD=output/digits/dkd,wrn_16_2,resnet8 -o output/curves

Without -o the pictures of one run go into its folder, those of many to output/curves.png and .svg.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mdistiller.analysis.plots.curves import draw_curves
from mdistiller.console import one_line_errors
from mdistiller.experiments.runs import read_runs


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or LABEL=FOLDER")
    parser.add_argument("-o", "--out", type=Path, help="without .png or .svg: both are written")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with one_line_errors():
        runs = read_runs(args.runs)
        alone = next(iter(runs.values())).folder
        out = args.out or (alone if len(runs) == 1 else Path("output")) / "curves"
        paths = [out] if out.suffix in (".png", ".svg") else [Path(f"{out}.png"), Path(f"{out}.svg")]
        out.parent.mkdir(parents=True, exist_ok=True)
        for path in paths:
            draw_curves(runs, path)
    print("wrote", " and ".join(map(str, paths)))


if __name__ == "__main__":
    main()
