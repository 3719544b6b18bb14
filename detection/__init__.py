"""Distillation of object detectors with detectron2. Importing `detection.model` registers RCNNKD and the backbones.

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

# detectron2 reads this variable once, at import. Its default is ./datasets, which is right inside this folder.
if not Path("datasets").is_dir():
    os.environ.setdefault("DETECTRON2_DATASETS", str(HERE / "datasets"))

with warnings.catch_warnings():
    # detectron2 compiles helpers with torch.jit; for each of them, newer torch warns that torch.jit is deprecated.
    warnings.simplefilter("ignore")
    import detectron2.engine
    import detectron2.evaluation
    import detectron2.modeling  # noqa: F401
