#!/usr/bin/env python
"""Put a teacher's and a student's weights into the one file that MODEL.WEIGHTS names.

    python detection/merge_weights.py --teacher model_final_f6e8b1.pkl --student resnet18.pth -o pretrained/r18-r101.pth
    python detection/merge_weights.py --config-file C --teacher T -o F        (a student trained from scratch)

--teacher: a detector of detectron2's model zoo (.pkl), or a checkpoint of this project. --student: such a detector, or
an ImageNet network of detectron2's model zoo, torchvision or timm. The two networks determine the published config;
--config-file names another one, and KEY VALUE overrides its settings.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mdistiller.arguments import PathArgument, with_numbers
from mdistiller.console import one_line_errors
from mdistiller.errors import UserError

with one_line_errors():
    import detection  # noqa: F401  (reports how to install detectron2 if it is missing)

from detection.model import merge
from detection.model.config import load_cfg


def report(whose: str, placed: merge.Placed) -> None:
    """Print how many tensors were matched, and list the others."""
    print(f"{whose}: {len(placed.weights)} tensors matched")
    counters = [name for name in placed.homeless if name.endswith("num_batches_tracked")]
    others = [name for name in placed.homeless if name not in counters]
    print(f"  not in the model: {len(others)}, and {len(counters)} num_batches_tracked", *others, sep="\n    ")
    print(f"  not in the file, left at their initial values: {len(placed.missing)}", *placed.missing, sep="\n    ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", action=PathArgument, required=True, help="the teacher's weights: a detector")
    parser.add_argument(
        "--student", action=PathArgument,
        help="the student's weights: an ImageNet network or a detector (default: none)",
    )  # fmt: skip
    parser.add_argument("-o", "--output", action=PathArgument, required=True)
    parser.add_argument(
        "--config-file", action=PathArgument, help="the pair's config (default: the published one for both networks)"
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="settings that override the config's")
    with one_line_errors():
        args = with_numbers(parser).parse_intermixed_args()
        if not (args.config_file or args.student):
            raise UserError("without --student the pair is unknown: name its config by --config-file")
        path = args.config_file or merge.config_for(args.teacher, args.student)
        print(f"config {path}")
        cfg = load_cfg(path, [*args.opts, "MODEL.DEVICE", "cpu"])
        for whose, placed in zip(("teacher", "student"), merge.merge(cfg, args.teacher, args.student, args.output)):
            report(whose, placed)
        note = merge.stride_note(cfg, args.student) if args.student else ""
    print(f"wrote {args.output}", *filter(None, [note]), sep="\n")


if __name__ == "__main__":
    main()
