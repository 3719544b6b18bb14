"""What the benchmarks share: measurements that alternate on one machine, and their spread."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence


def take_turns(works: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The results of calling each work `rounds` times, alternating, so that all see the same machine load."""
    reached: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            reached[name].append(work())
    return reached


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratio(values: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """The spread of `values` / `base`, turn by turn, so that a temporary slowdown of the machine affects both."""
    return spread([a / b for a, b in zip(values, base)])
