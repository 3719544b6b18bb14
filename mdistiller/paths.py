"""Where files are: those that a user names, and the project's own configs, plans, groups and published checkpoints."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from .errors import UserError

PACKAGE = Path(__file__).resolve().parent
# A clone has configs/ and plans/ next to the package; an installed wheel has them inside it.
CLONE: Path | None = PACKAGE.parent if (PACKAGE.parent / "tools" / "train.py").is_file() else None
SHIPPED = CLONE or PACKAGE


def expanded(path: str | Path) -> str:
    """`path` with the home folder in place of a leading `~` or `~user`, as a shell writes it.

    A file of that very name, such as `~old` in the current folder, keeps it where no user is called so.

    Raises:
        UserError: there is neither such a user nor such a file.
    """
    path = str(path)
    if not path.startswith("~"):
        return path
    with suppress(ValueError):  # a null byte, or characters that no user's name has
        home = os.path.expanduser(path)
        if home != path:
            return home
    if os.path.lexists(path):
        return path
    user = Path(path).parts[0]
    why = "this user has no home folder; set HOME" if user == "~" else f"there is no user {user[1:]}"
    raise UserError(f"cannot expand {user} of the path {path}: {why}, or write ./{path} for a file of that name")


def find_file(name: str | Path) -> Path | None:
    """The file `name`, relative to the current folder, else to `SHIPPED`; None if neither exists.

    Raises:
        UserError: see `expanded`.
    """
    given = Path(expanded(name))
    # os.path.isfile is False for a name that no file system takes, where Path.is_file raises an OSError.
    return next((path for path in (given, SHIPPED / given) if os.path.isfile(path)), None)
