#!/usr/bin/env python
"""Group the classes that a teacher confuses, for DCGD; writes the groups (JSON) and the confusion matrix (PNG).

    python tools/group_classes.py -m resnet56 --num-groups 5 -o output/groups/res56.json
    python tools/group_classes.py -m wrn_16_2 -c output/digits/teacher,wrn_16_2/student_best -d digits --num-groups 2 \\
        --split kfold -o output/groups/digits.json

The same as `mdistiller group-classes`; mdistiller/commands/group_classes.py has the code.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # straight from a clone, without installing

from mdistiller.commands.group_classes import main

if __name__ == "__main__":
    main(prog="python tools/group_classes.py")
