"""What the benchmarks share: works that take turns on one machine, and the spread of what they reach."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence


def take_turns(works: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each work returns, `rounds` times over; in turns, so that all meet the same machine."""
    reached: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            reached[name].append(work())
    return reached


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratio(values: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """The spread of `values` over `base`, turn by turn: what slows the machine down for a while slows both."""
    return spread([a / b for a, b in zip(values, base)])
