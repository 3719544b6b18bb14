"""docs/modes.md: its tables are those of the code. `python -m tests.test_docs_modes` prints them."""

import re
from pathlib import Path

from mdistiller.distillers import distiller_dict
from mdistiller.engine.cfg import CFG
from mdistiller.engine.modes import MODES, RULES, SIDES, TRAITS, Setup
from mdistiller.engine.update import SumUpdate

PAGE = Path(__file__).resolve().parents[1] / "docs" / "modes.md"


def modes_table() -> list[str]:
    """Each mode with the settings that switch it on, as the tests do."""
    rows = ["| mode | for example |", "|---|---|"]
    for mode in MODES:
        settings = ", ".join(f"`{key} {value}`" for key, value in mode.settings.items())
        rows.append(f"| {mode.name} | {settings or '`torchrun --nproc_per_node=2`'} |")
    return rows


def rules_table() -> list[str]:
    """Each pair that is refused; the numbers of a run stand as N."""
    rows = ["| this | does not go with | because | so |", "|---|---|---|---|"]
    for rule in RULES:
        cells = (rule.this, rule.that, rule.reason, rule.remedy)
        rows.append(f"| {' | '.join(re.sub('{[^}]*}', 'N', cell) for cell in cells)} |")
    return rows


def methods_table() -> list[str]:
    """What each registered method is like, as far as its class tells, and what it therefore does not go with."""
    rows = ["| method | does not go with |", "|---|---|"]
    for name, method in sorted(distiller_dict.items()):
        run = Setup(CFG, method, SumUpdate, 1)
        like = {trait.name for trait in TRAITS if trait.name.startswith("methods ") and trait.holds(run)}
        others = [rule.this if rule.that in like else rule.that for rule in RULES if {rule.this, rule.that} & like]
        base = " (as its base method, here KD)" if getattr(method, "base", "") is None else ""
        rows.append(f"| {name} | {', '.join(dict.fromkeys(others)) or 'nothing: all modes'}{base} |")
    return rows


def test_the_page_shows_the_tables_of_the_code():
    page = PAGE.read_text()
    for table in (modes_table(), rules_table(), methods_table()):
        assert "\n".join(table) in page


def test_the_page_shows_no_other_table():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    assert rows == modes_table() + rules_table() + methods_table()
    assert all(name in SIDES for rule in RULES for name in (rule.this, rule.that))


if __name__ == "__main__":
    print(*modes_table(), "", *rules_table(), "", *methods_table(), sep="\n")
