"""No test fails because the machine is busy: none asserts that real seconds passed stay below a number.

A wait is bounded by what ends it (`timeout=` of a process, a deadline in a loop), and speed is measured in benchmarks/.
"""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).parent
CLOCKS = {"time.time", "time.monotonic", "time.perf_counter"}


def reads_a_clock(node: ast.AST) -> bool:
    return any(isinstance(n, ast.Call) and ast.unparse(n.func) in CLOCKS for n in ast.walk(node))


def loops(tree: ast.AST) -> set[ast.AST]:
    """What stands inside a loop: an assertion there is a deadline of a wait."""
    return {inner for node in ast.walk(tree) if isinstance(node, (ast.While, ast.For)) for inner in ast.walk(node)}


def clocked(source: str) -> list[int]:
    """The lines that assert something of a clock outside of a loop."""
    tree = ast.parse(source)
    waits = loops(tree)
    asserts = (n for n in ast.walk(tree) if isinstance(n, ast.Assert) and n not in waits)
    return [node.lineno for node in asserts if reads_a_clock(node.test)]


def test_no_assertion_reads_a_clock():
    found = [f"{p.relative_to(TESTS)}:{line}" for p in TESTS.rglob("*.py") for line in clocked(p.read_text("utf-8"))]
    assert not found, found


def test_one_that_does_is_found():
    assert clocked("start = time.monotonic()\nassert time.monotonic() - start < 5\n") == [2]
    assert clocked("while not done():\n    assert time.monotonic() < until\n") == []
