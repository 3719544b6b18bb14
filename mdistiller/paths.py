"""Where the project's own files are: configs, plans, groups of classes, published checkpoints."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
# A clone has configs/ and plans/ next to the package; an installed wheel has them inside it.
CLONE: Path | None = PACKAGE.parent if (PACKAGE.parent / "tools" / "train.py").is_file() else None
SHIPPED = CLONE or PACKAGE


def find_file(name: str | Path) -> Path | None:
    """The file `name`, relative to the current folder, else to `SHIPPED`; None if neither exists."""
    # os.path.isfile is False for a name that no file system takes, where Path.is_file raises an OSError.
    return next((path for path in (Path(name), SHIPPED / name) if os.path.isfile(path)), None)
