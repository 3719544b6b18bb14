#!/usr/bin/env python
"""Train a student, with or without a teacher, as a YAML file describes.

    python tools/train.py --cfg configs/digits/kd.yaml
    python tools/train.py --cfg configs/cifar100/dkd/res56_res20.yaml SOLVER.BATCH_SIZE 128 EXPERIMENT.SEED 1
    torchrun --nproc_per_node=4 tools/train.py --cfg configs/imagenet/r34_r18/dkd.yaml

The same as `mdistiller train`; mdistiller/commands/train.py has the code.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # straight from a clone, without installing

from mdistiller.commands.train import main

if __name__ == "__main__":
    main(prog="python tools/train.py")
