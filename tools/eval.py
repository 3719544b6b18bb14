#!/usr/bin/env python
"""Score a network on a data set's validation images: top-1, top-5, loss, speed and cost.

    python tools/eval.py -m resnet32x4                                    # the published teacher, on CIFAR-100
    python tools/eval.py -m resnet8 -d digits -c output/digits/kd,wrn_16_2,resnet8/student_best

The same as `mdistiller eval`; mdistiller/commands/eval.py has the code.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # straight from a clone, without installing

from mdistiller.commands.eval import main

if __name__ == "__main__":
    main(prog="python tools/eval.py")
