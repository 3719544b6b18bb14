"""A covering array: few cases of many factors, in which every pair of levels that may meet occurs at least once."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence

# Factor -> its level.
Case = dict[str, str]
# Two levels with their factors.
Pair = tuple[tuple[str, str], tuple[str, str]]
# Whether a case, of some of the factors, may be.
Allowed = Callable[[Case], bool]


def pairs_of(factors: Mapping[str, Sequence[str]]) -> list[Pair]:
    """Every pair of levels of two factors."""
    levels = [(factor, level) for factor, own in factors.items() for level in own]
    return [(a, b) for a, b in itertools.combinations(levels, 2) if a[0] != b[0]]


def covering_array(
    factors: Mapping[str, Sequence[str]], pairs: Iterable[Pair], allowed: Allowed, seed: int, tries: int = 30
) -> list[Case]:
    """Cases that hold every allowed one of these pairs: greedily, each is the best of some random ones."""
    draw = random.Random(seed)
    wanted = {pair for pair in pairs if allowed(dict(pair))}
    order = list(factors)
    cases = []
    while wanted:
        drawn = (random_case(factors, allowed, draw, dict(draw.choice(sorted(wanted))), wanted) for _ in range(tries))
        best = max(drawn, key=lambda case: len(wanted & pairs_in(case, order)))
        wanted -= pairs_in(best, order)
        cases.append(best)
    return cases


def pairs_in(case: Case, order: Sequence[str]) -> set[Pair]:
    """The pairs of a case, with the factors in `order`."""
    return set(itertools.combinations([(factor, case[factor]) for factor in order if factor in case], 2))


def random_case(
    factors: Mapping[str, Sequence[str]],
    allowed: Allowed,
    draw: random.Random,
    begun: Case | None = None,
    wanted: set[Pair] | None = None,
) -> Case:
    """A case with the levels in `begun`: the other factors, in random order, get the level of the most `wanted` pairs.

    Without `wanted`, every allowed level is as likely.
    """
    case, order = dict(begun or {}), list(factors)
    for factor in draw.sample(order, len(order)):
        if factor in case:
            continue
        levels = [level for level in factors[factor] if allowed({**case, factor: level})]
        draw.shuffle(levels)
        case[factor] = max(levels, key=lambda level: len((wanted or set()) & _new_pairs(case, factor, level, order)))
    return case


def _new_pairs(case: Case, factor: str, level: str, order: Sequence[str]) -> set[Pair]:
    place = order.index(factor)
    return {
        ((other, at), (factor, level)) if order.index(other) < place else ((factor, level), (other, at))
        for other, at in case.items()
    }
