#!/usr/bin/env python
"""List the data sets, for DATASET.TYPE.

    python tools/datasets.py
    python tools/datasets.py '*imagenet*'

The same as `mdistiller datasets`; mdistiller/commands/datasets.py has the code.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # straight from a clone, without installing

from mdistiller.commands.datasets import main

if __name__ == "__main__":
    main(prog="python tools/datasets.py")
