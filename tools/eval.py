#!/usr/bin/env python
"""Score a network on a data set's validation images: top-1, top-5, loss, speed and cost.

    python tools/eval.py -m resnet32x4                                    # the published teacher, on CIFAR-100
    python tools/eval.py -m resnet8 -d digits -c output/digits/kd,wrn_16_2,resnet8/student_best
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mdistiller.commands._arguments import trained_network_arguments
from mdistiller.commands.eval import evaluate_checkpoint
from mdistiller.console import one_line_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    trained_network_arguments(parser, batch_size=64)
    parser.add_argument("--head", help="of a network with several heads: which one is scored (default: all)")
    parser.add_argument("--groups", default="", help="of a plain network that DCGD grouped: what DCGD.GROUPS was")
    return parser.parse_args()


def main() -> None:
    with one_line_errors():
        print(evaluate_checkpoint(**vars(parse_args())))


if __name__ == "__main__":
    main()
