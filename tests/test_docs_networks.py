"""docs/networks.md: which networks of other libraries a method takes; `python -m tests.test_docs_networks` counts."""

import tempfile
from pathlib import Path

from .distillers.pairs import METHODS, NETWORKS, ROLES, outcome

PAGE = Path(__file__).resolve().parents[1] / "docs" / "networks.md"
HEADER = ["| method | teachers | students | refused teachers | refused students |", "|---|---|---|---|---|"]
ALL, NONE = "all", "none"


def row(method: str, refused: dict[str, list[str]]) -> str:
    """The method's line, from the networks that it refuses in each role."""
    counts = [f"{len(NETWORKS) - len(refused[role])} of {len(NETWORKS)}" for role in ROLES]
    names = [ALL if refused[role] == list(NETWORKS) else ", ".join(refused[role]) or NONE for role in ROLES]
    return f"| {' | '.join([method, *counts, *names])} |"


def refused_on_the_page() -> dict[str, dict[str, list[str]]]:
    """Method -> role -> the networks that it refuses, as docs/networks.md says."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = lines.index(HEADER[0]) + len(HEADER)
    found = {}
    for line in lines[start : start + len(METHODS)]:
        method, _, _, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        lists = [list(NETWORKS) if cell == ALL else [] if cell == NONE else cell.split(", ") for cell in cells]
        found[method] = dict(zip(ROLES, lists))
    return found


def test_the_page_lists_every_method_and_counts_what_it_lists():
    """That it lists what happens is tested step by step in tests/distillers/test_every_pair.py."""
    refused = refused_on_the_page()
    assert tuple(refused) == METHODS
    assert all(set(names) <= set(NETWORKS) for roles in refused.values() for names in roles.values())
    page = PAGE.read_text(encoding="utf-8")
    assert "\n".join([*HEADER, *(row(method, roles) for method, roles in refused.items())]) in page
    assert [line.split("|")[1].strip() for line in rule_table()] == list(METHODS)


def rule_table() -> list[str]:
    """The page's lines that say what each method compares."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = lines.index("| method | compares | of other sizes or widths | refused |") + 2
    return lines[start : start + len(METHODS)]


def table() -> list[str]:
    """The table, from a step of every method with every network as teacher and as student: about two minutes."""
    refused: dict[str, dict[str, list[str]]] = {method: {role: [] for role in ROLES} for method in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        groups = Path(folder) / "groups.json"
        groups.write_text("[[0, 1], [2, 3]]")
        for name in NETWORKS:
            for role in ROLES:
                for method in METHODS:
                    if outcome(method, name, role, str(groups)).refusal:
                        refused[method][role].append(name)
    return [*HEADER, *(row(method, roles) for method, roles in refused.items())]


if __name__ == "__main__":
    print(*table(), sep="\n")
