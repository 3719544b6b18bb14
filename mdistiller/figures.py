"""Matplotlib's figures, imported when the first one is drawn; no display and no interactive backend is needed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def _any_backend() -> Iterator[None]:
    """A context in which matplotlib is imported whatever MPLBACKEND says.

    In a notebook it names the notebook's backend; where that is not installed, the import fails. A figure that is only
    written to a file needs none. Where it is installed, the notebook's own plots use it as before.
    """
    chosen = os.environ.get("MPLBACKEND", "")
    if "matplotlib" in sys.modules or not chosen:
        yield
        return
    os.environ["MPLBACKEND"] = "agg"
    try:
        yield
    finally:
        os.environ["MPLBACKEND"] = chosen
        import matplotlib

        with suppress(ValueError):  # it is not installed
            matplotlib.rcParams["backend"] = chosen


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of `width` x `height` inches; `savefig` writes it."""
    with _any_backend():
        from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")
