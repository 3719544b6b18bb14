#!/usr/bin/env python
"""Convert a network's weights: torch checkpoint <-> safetensors, by the name of the file to write.

    python tools/convert.py output/digits/kd,wrn_16_2,resnet8/student_best resnet8.safetensors
    python tools/convert.py resnet8.safetensors resnet8.pth

Every tool that takes a checkpoint takes .safetensors too.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mdistiller.commands.convert import convert
from mdistiller.console import one_line_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="student_best, best, a published checkpoint, ...")
    parser.add_argument("target", type=Path, help="the file to write; .safetensors, or anything else for torch")
    return parser.parse_args()


def main() -> None:
    with one_line_errors():
        print(convert(**vars(parse_args())))


if __name__ == "__main__":
    main()
