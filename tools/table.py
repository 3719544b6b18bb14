#!/usr/bin/env python
"""Run a plan of configs x overrides x seeds, and put the results into a table.

    python tools/table.py plans/digits.yaml
    python tools/table.py plans/cifar100_same_style.yaml --jobs 4 --only 'KD, resnet56 -> resnet20' LOG.WANDB False

The same as `mdistiller table`; mdistiller/commands/table.py has the code.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # straight from a clone, without installing

from mdistiller.commands.table import main

if __name__ == "__main__":
    main(prog="python tools/table.py")
