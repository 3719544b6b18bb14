"""Colours, dashes and markers of all plots."""

from __future__ import annotations

from typing import Any

# Okabe and Ito's colours, which colour-blind readers can distinguish.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#999999"
DASHES = ("-", "--", ":", "-.")
MARKERS = "osD^v"


def line_style(index: int) -> dict[str, Any]:
    """Colour and dashes of line number `index`, from 0; when the colours are used up, the dashes change."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index // len(COLOURS) % len(DASHES)]}


def point_style(index: int) -> dict[str, Any]:
    """Colour and marker of class number `index`, from 0; when the colours are used up, the marker changes."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index // len(COLOURS) % len(MARKERS)]}
