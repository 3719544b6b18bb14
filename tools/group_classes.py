#!/usr/bin/env python
"""Group the classes that a teacher confuses, for DCGD; writes the groups (JSON) and the confusion matrix (PNG).

    python tools/group_classes.py -m resnet56 --num-groups 5 -o output/groups/res56.json
    python tools/group_classes.py -m wrn_16_2 -c output/digits/teacher,wrn_16_2/student_best -d digits --num-groups 2 \\
        --split kfold -o output/groups/digits.json

CIFAR-100 is grouped by its 20 super-classes, other data sets by their classes. The groups are then used with
DCGD.GROUPS FILE and a plain student, such as DISTILLER.STUDENT resnet20.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mdistiller.commands._arguments import trained_network_arguments
from mdistiller.commands.group_classes import group_classes
from mdistiller.console import one_line_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    trained_network_arguments(parser, batch_size=256)
    parser.add_argument("-o", "--out", type=Path, default=Path("groups.json"), help="JSON file; the PNG goes beside it")
    parser.add_argument("--num-groups", type=int, default=5, help="G; at most half as many as classes")
    parser.add_argument(
        "--split", default="train",
        help="images to count mistakes on: train (default); heldout, for a teacher trained with DATASET.VAL_FRACTION; "
        "kfold, cross-validating its last layer on the training images; test, which leaks the test set",
    )  # fmt: skip
    parser.add_argument("--single-classes", action="store_true", help="group classes, not CIFAR-100's super-classes")
    parser.add_argument("--val-fraction", type=float, default=0.1, help="of --split heldout: the teacher's own")
    parser.add_argument("--folds", type=int, default=5, help="of --split kfold")
    return parser.parse_args()


def main() -> None:
    with one_line_errors():
        print(group_classes(**vars(parse_args())))


if __name__ == "__main__":
    main()
