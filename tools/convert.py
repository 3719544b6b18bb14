#!/usr/bin/env python
"""Convert a network's weights between torch checkpoints and safetensors; the suffix of the file to write decides.

    python tools/convert.py output/digits/kd,wrn_16_2,resnet8/student_best resnet8.safetensors
    python tools/convert.py resnet8.safetensors resnet8.pth

The same as `mdistiller convert`; mdistiller/commands/convert.py has the code.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # straight from a clone, without installing

from mdistiller.commands.convert import main

if __name__ == "__main__":
    main(prog="python tools/convert.py")
