#!/usr/bin/env python
"""Distil on scikit-learn's handwritten digits, with nothing to download, in a few minutes on two cores.

    python tools/quickstart.py

The same as `mdistiller quickstart`; mdistiller/commands/quickstart.py has the code.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # straight from a clone, without installing

from mdistiller.commands.quickstart import main

if __name__ == "__main__":
    main(prog="python tools/quickstart.py")
