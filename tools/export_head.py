#!/usr/bin/env python
"""Write the plain head of a DCGD student as a checkpoint of the plain network, such as resnet20.

    python tools/export_head.py output/cifar100_baselines/dcgd_kd,res56,res20/student_best_single -o resnet20.pth
    python tools/export_head.py student_best -m resnet8 -d digits -o resnet8.pth

The same as `mdistiller export-head`; mdistiller/commands/export_head.py has the code.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # straight from a clone, without installing

from mdistiller.commands.export_head import main

if __name__ == "__main__":
    main(prog="python tools/export_head.py")
