#!/usr/bin/env python
"""Write the student of a checkpoint as a checkpoint and a config that plain detectron2 loads.

    python detection/export_student.py --config-file detection/configs/DKD/DKD-R18-R101.yaml \\
        --weights output/DKD-R18-R101/model_final.pth -o student.pth

The config is written beside, as student.yaml. One of a MobileNetV2 needs `import detection.model` in detectron2,
and its `add_distillation_cfg`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mdistiller.console import one_line_errors

with one_line_errors():
    import detection  # noqa: F401  (says how to install detectron2 where it is not)

from detection.model.config import load_cfg
from detection.model.merge import export, student_cfg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="what the checkpoint was trained with")
    parser.add_argument("--weights", required=True, help="a checkpoint of student and teacher")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="settings over those of the config")
    args = parser.parse_intermixed_args()
    with one_line_errors():
        cfg = load_cfg(args.config_file, args.opts)
        count = export(args.weights, args.output)
        config = args.output.with_suffix(".yaml")
        config.write_text(student_cfg(cfg, args.output).dump())
    print(f"wrote {args.output} ({count} tensors) and {config}")


if __name__ == "__main__":
    main()
