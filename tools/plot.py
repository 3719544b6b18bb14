#!/usr/bin/env python
"""Draw the curves of one or more runs: accuracy and every loss term by epoch, as PNG and SVG.

    python tools/plot.py output/digits/kd,wrn_16_2,resnet8
    python tools/plot.py KD=output/digits/kd,wrn_16_2,resnet8 DKD=output/digits/dkd,wrn_16_2,resnet8 -o output/curves

The same as `mdistiller plot`; mdistiller/commands/plot.py has the code.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # straight from a clone, without installing

from mdistiller.commands.plot import main

if __name__ == "__main__":
    main(prog="python tools/plot.py")
