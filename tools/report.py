#!/usr/bin/env python
"""Make one HTML page of a run, or of a plan's table: metrics, curves, plots, configuration, environment.

    python tools/report.py output/digits/kd,wrn_16_2,resnet8
    python tools/report.py output/plan_digits -o digits.html

The same as `mdistiller report`; mdistiller/commands/report.py has the code.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # straight from a clone, without installing

from mdistiller.commands.report import main

if __name__ == "__main__":
    main(prog="python tools/report.py")
