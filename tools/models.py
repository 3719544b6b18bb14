#!/usr/bin/env python
"""List the networks that can be named, and on request what each costs.

    python tools/models.py
    python tools/models.py 'timm/*mobilenet*' --cost

The same as `mdistiller models`; mdistiller/commands/models.py has the code.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # straight from a clone, without installing

from mdistiller.commands.models import main

if __name__ == "__main__":
    main(prog="python tools/models.py")
