"""Distillation of detectors: a project inside detectron2. `model` registers RCNNKD and the backbones with it.

Raises:
    UserError: detectron2 is not installed; the message says how to install it.
"""

import importlib.util
import os
import warnings
from pathlib import Path

from mdistiller.errors import UserError

HERE = Path(__file__).resolve().parent

if importlib.util.find_spec("detectron2") is None:
    raise UserError("detectron2 is not installed: run `make detection`, or see docs/detection.md, Installation")

# detectron2 reads this once, when it is imported. Its own default is ./datasets, which works from inside this folder.
if not Path("datasets").is_dir():
    os.environ.setdefault("DETECTRON2_DATASETS", str(HERE / "datasets"))

with warnings.catch_warnings():
    # detectron2 compiles helpers with torch.jit, which newer torch calls deprecated, once for each of them.
    warnings.simplefilter("ignore")
    import detectron2.engine
    import detectron2.evaluation
    import detectron2.modeling  # noqa: F401
