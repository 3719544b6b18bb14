#!/usr/bin/env python
"""Look inside a trained network, and at how a student differs from its teacher.

    python tools/inspect_features.py --run output/digits/kd,wrn_16_2,resnet8
    python tools/inspect_features.py -m resnet20 -c student_best --teacher resnet56 -o output/inspect/resnet20
    python tools/inspect_features.py -m resnet56                                   # a published teacher alone

Pictures, each with its figures in a file beside it: t-SNE of the pooled features, confusion matrix, reliability diagram
with the expected calibration error; with a teacher also the differences of mean logits and of class correlations, and
the CKA between the stages of both.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mdistiller.commands._arguments import trained_network_arguments
from mdistiller.commands.inspect_features import inspect_network, run_networks
from mdistiller.console import one_line_errors


def parse_args() -> argparse.Namespace:
    of_run = argparse.ArgumentParser(add_help=False)
    of_run.add_argument("--run", type=Path, help="a run's folder: tells all but the options that follow it")
    run, rest = of_run.parse_known_args()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[of_run]
    )
    trained_network_arguments(parser, batch_size=256)
    parser.add_argument("--teacher", help="the teacher's name (default: none)")
    parser.add_argument("--teacher-ckpt", default="pretrain", help="its checkpoint; `pretrain` (default) is published")
    parser.add_argument("--head", help="of a student with several heads: which one (default: its first)")
    parser.add_argument("--groups", default="", help="of a plain student that DCGD grouped: what DCGD.GROUPS was")
    parser.add_argument("--tsne-images", type=int, default=1000, help="how many test images t-SNE lays out; 0: none")
    parser.add_argument("--bins", type=int, default=15, help="of the reliability diagram")
    parser.add_argument("--seed", type=int, default=0, help="of t-SNE")
    parser.add_argument("-o", "--out", type=Path, default=Path("output/inspect"), help="the pictures' folder")
    with one_line_errors():
        networks = run_networks(run.run) if run.run else {}
    told = [f"--{name.replace('_', '-')}={value}" for name, value in networks.items()]
    args = parser.parse_args([*told, *rest])
    del args.run
    return args


def main() -> None:
    args = parse_args()
    with one_line_errors():
        print(inspect_network(**vars(args)))


if __name__ == "__main__":
    main()
