"""Load groups by name or from a JSON file, and save them to one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..paths import find_file
from ..registry import unknown_name
from ..user_files import read_json, writing
from .algorithm import expand
from .cifar100 import PUBLISHED, SUPERCLASS


def published_groups(teacher: str) -> list[list[int]]:
    """The groups of CIFAR-100 classes published for a teacher: "res56", "res110" or "wrn_40_2".

    Raises:
        UnknownNameError: no groups were published under that name.
    """
    if teacher not in PUBLISHED:
        raise unknown_name("published grouping", teacher, PUBLISHED)
    return expand(PUBLISHED[teacher], SUPERCLASS)


def load_groups(source: str) -> list[list[int]]:
    """The groups of classes that `DCGD.GROUPS` names.

    Args:
        source: a JSON file (anything ending in ".json": a list of lists of class indices, or a dict that holds one
            under "groups", as `tools/group_classes.py` writes it), else the name of a published grouping. A relative
            path is looked for in the current folder, then in the project's own files.

    Raises:
        UserError: `source` is neither, or the file holds something else.
    """
    if not source.endswith(".json"):
        return published_groups(source)
    path = find_file(source)
    if path is None:
        raise UserError(f"no groups file {source}; tools/group_classes.py writes one")
    content = read_json(path, "groups file", "tools/group_classes.py writes one")
    groups: Any = content.get("groups") if isinstance(content, dict) else content
    if not _is_list_of_int_lists(groups):
        raise UserError(f'{source} holds no groups; expected {{"groups": [[0, 2], [1, 3]]}} or the bare list of lists')
    return groups


def _is_list_of_int_lists(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(g, list) and all(type(c) is int for c in g) for g in value)


def check_groups(groups: list[list[int]], num_classes: int) -> None:
    """Refuse groups that are not a partition of the classes.

    Raises:
        UserError: a group is empty, or a class of [0, num_classes) is missing or there twice, or one is out of range.
    """
    classes = [c for group in groups for c in group]
    if not all(groups) or not groups:
        raise UserError(f"a group is empty: {groups}")
    if sorted(classes) == list(range(num_classes)):
        return
    missing = sorted(set(range(num_classes)) - set(classes))
    unknown = sorted(set(classes) - set(range(num_classes)))
    twice = sorted({c for c in classes if classes.count(c) > 1})
    raise UserError(
        f"the groups must hold each class from 0 to {num_classes - 1} once: "
        f"missing {missing or 'none'}, unknown {unknown or 'none'}, twice {twice or 'none'}; "
        "are they meant for another data set?"
    )


def save_groups(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as JSON: each key on a line of its own, each row of a table too."""
    lines = [f"  {json.dumps(key)}: {_rows(value)}" for key, value in content.items()]
    with writing(path):
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _rows(value: Any) -> str:
    """JSON of `value`; a list of lists has each on its own line."""
    if isinstance(value, list) and value and isinstance(value[0], list):
        return "[\n" + ",\n".join(f"    {json.dumps(row)}" for row in value) + "\n  ]"
    return json.dumps(value)
