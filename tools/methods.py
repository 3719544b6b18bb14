#!/usr/bin/env python
"""List the distillation methods with their papers, and on request their hyper-parameters.

    python tools/methods.py
    python tools/methods.py dkd --settings

The same as `mdistiller methods`; mdistiller/commands/methods.py has the code.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # straight from a clone, without installing

from mdistiller.commands.methods import main

if __name__ == "__main__":
    main(prog="python tools/methods.py")
