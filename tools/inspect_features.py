#!/usr/bin/env python
"""Plot a trained network's features, errors and calibration, and how a student differs from its teacher.

    python tools/inspect_features.py --run output/digits/kd,wrn_16_2,resnet8
    python tools/inspect_features.py -m resnet20 -c student_best --teacher resnet56 -o output/inspect/resnet20
    python tools/inspect_features.py -m resnet56                                   # a published teacher alone

The same as `mdistiller inspect-features`; mdistiller/commands/inspect_features.py has the code.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # straight from a clone, without installing

from mdistiller.commands.inspect_features import main

if __name__ == "__main__":
    main(prog="python tools/inspect_features.py")
