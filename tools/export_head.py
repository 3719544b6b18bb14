#!/usr/bin/env python
"""Write the plain head of a DCGD student as an ordinary checkpoint, which tools/eval.py reads by the plain name.

    python tools/export_head.py output/cifar100_baselines/dcgd_kd,res56,res20/student_best_single -o resnet20.pth
    python tools/export_head.py student_best -m resnet8 -d digits -o resnet8.pth
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mdistiller.commands.export_head import export_head
from mdistiller.console import one_line_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ckpt", type=Path, help="a grouped student: student_best_single, student_latest, best, ...")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the file to write")
    parser.add_argument("-m", "--model", help="the plain network (default: as config.yaml beside the checkpoint says)")
    parser.add_argument("-d", "--dataset", help="its data set (default: the same, else cifar100)")
    return parser.parse_args()


def main() -> None:
    with one_line_errors():
        print(export_head(**vars(parse_args())))


if __name__ == "__main__":
    main()
