#!/usr/bin/env python
"""Write the student of a checkpoint as a checkpoint and a config that plain detectron2 loads.

    python detection/export_student.py --config-file detection/configs/DKD/DKD-R18-R101.yaml \\
        --weights output/DKD-R18-R101/model_final.pth -o student.pth

The config is written next to it, as student.yaml. detectron2 has no MobileNetV2: to load such a student there, import
`detection.model` and call its `add_distillation_cfg`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mdistiller.arguments import PathArgument, with_numbers
from mdistiller.console import one_line_errors
from mdistiller.user_files import writing

with one_line_errors():
    import detection  # noqa: F401  (reports how to install detectron2 if it is missing)

from detection.model.config import load_cfg
from detection.model.merge import export, student_cfg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config-file", action=PathArgument, required=True, help="the config that the checkpoint was trained with"
    )
    parser.add_argument("--weights", action=PathArgument, required=True, help="a checkpoint of student and teacher")
    parser.add_argument("-o", "--output", action=PathArgument, type=Path, required=True)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="settings that override the config's")
    with one_line_errors():
        args = with_numbers(parser).parse_intermixed_args()
        cfg = load_cfg(args.config_file, args.opts)
        count = export(args.weights, args.output)
        config = args.output.with_suffix(".yaml")
        with writing(config):
            config.write_text(student_cfg(cfg, args.output).dump())
    print(f"wrote {args.output} ({count} tensors) and {config}")


if __name__ == "__main__":
    main()
