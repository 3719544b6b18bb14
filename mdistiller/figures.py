"""Matplotlib's figures, imported when the first one is drawn; no display and no interactive backend is needed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of `width` x `height` inches; `savefig` writes it."""
    try:
        from matplotlib.figure import Figure
    except ValueError:
        # In a notebook, MPLBACKEND names the notebook's backend, which may not be installed for this Python: then
        # importing matplotlib fails. A figure that is only written to a file needs no backend.
        chosen = os.environ.pop("MPLBACKEND", None)
        if chosen is None:
            raise
        from matplotlib.figure import Figure

        os.environ["MPLBACKEND"] = chosen
    return Figure(figsize=(width, height), layout="constrained")
