"""The values that a setting allows, such as `POSITIVE` or `whole(1)`: for the engine's settings and the methods'.

No range of numbers holds NaN, an infinity, True or False. `refused` says what is wrong with a value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from sys import float_info
from typing import Any


@dataclass(frozen=True)
class Range:
    """The values that a setting allows.

    Attributes:
        words: the values in words that follow "must be".
        holds: whether a value is one of them; called with values of any type.
        most: the largest absolute value of a number; None: that of where the range is checked.
    """

    words: str
    holds: Callable[[Any], bool]
    most: float | None = None

    def refused(self, value: Any, most: float = inf) -> str:
        """What `value` must be instead, as words that follow "must be"; empty if it is allowed.

        Args:
            most: the largest absolute value of a number, where the range itself sets none.
        """
        if not self.holds(value):
            return self.words
        limit = most if self.most is None else self.most
        return f"at most {limit:.10g} in size" if _largest(value) > limit else ""


def _largest(value: Any) -> float:
    """The largest absolute value in `value`, a number or nested lists of numbers; 0 where there is none."""
    if isinstance(value, (list, tuple)):
        return max(map(_largest, value), default=0)
    return abs(value) if isinstance(value, (int, float)) else 0


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    """Whether `value` is a number in the range of floats, which an int may exceed."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= float_info.max


POSITIVE = Range("positive and finite", lambda v: _is_finite(v) and v > 0)
TEMPERATURE = Range(POSITIVE.words, POSITIVE.holds, 1e9)  # losses are scaled by its square, which an int64 holds
NOT_NEGATIVE = Range(">= 0 and finite", lambda v: _is_finite(v) and v >= 0)
WHOLE = Range("a whole number", _is_whole)
TEXT = Range("text", lambda v: isinstance(v, str))
PATH = Range("a path without null characters", lambda v: isinstance(v, str) and "\0" not in v)
ODD = Range("an odd whole number >= 1", lambda v: _is_whole(v) and v >= 1 and v % 2 == 1)


def whole(low: int, most: float | None = None) -> Range:
    """Whole numbers from `low` on, of at most `most`; 2.0 is none."""
    return Range(f"a whole number >= {low}", lambda v: _is_whole(v) and v >= low, most)


def interval(low: float, high: float, ends: str) -> Range:
    """Numbers from `low` to `high`; `ends` is "[]", "[)", "(]" or "()": a round bracket leaves the end itself out."""

    left_out = [end for end, bracket in zip((low, high), ends) if bracket in "()"]

    def holds(v: Any) -> bool:
        return _is_finite(v) and low <= v <= high and v not in left_out

    return Range(f"in {ends[0]}{low}, {high}{ends[1]}", holds)


def one_of(*values: str) -> Range:
    """These words alone."""
    return Range(f"one of {', '.join(values)}", lambda v: v in values)


def list_of(item: Range, *lengths: int) -> Range:
    """Lists of values in `item`; if `lengths` are given, of one of these lengths only."""
    count = f"{' or '.join(map(str, lengths))} values" if lengths else "values"

    def holds(v: Any) -> bool:
        return isinstance(v, (list, tuple)) and (not lengths or len(v) in lengths) and all(map(item.holds, v))

    return Range(f"a list of {count}, each {item.words}", holds)
