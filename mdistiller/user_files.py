"""Files that a user names: an error of the disk or of the content becomes a UserError that names the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from .console import one_line
from .errors import UserError


def read_text(path: str | Path, what: str, next_step: str) -> str:
    """The text of the file `path`.

    Args:
        what: the kind of file, such as "config".
        next_step: what the user can do about an error.

    Raises:
        UserError: it cannot be read, or it is not text in UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        why = f"{error.reason} at byte {error.start}"
        raise UserError(f"{what} {path} is not a text file ({why}); {next_step}") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise unreadable(f"{what} {path}", error, next_step) from None


def read_yaml(path: str | Path, what: str, next_step: str) -> Any:
    """The content of the YAML file `path`; the arguments are those of `read_text`.

    Raises:
        UserError: it cannot be read, or it is not valid YAML.
    """
    text = read_text(path, what, next_step)
    try:
        return yaml.safe_load(text)
    except Exception as error:  # PyYAML also raises ValueError, AttributeError, RecursionError and others
        raise UserError(f"{what} {path} is not valid YAML: {one_line(error)}") from None


@contextmanager
def reading(what: str, next_step: str) -> Iterator[None]:
    """Turn an OSError of the `with` block, which reads `what`, into a UserError with the `next_step`."""
    try:
        yield
    except OSError as error:
        raise unreadable(what, error, next_step) from None


def unreadable(what: str, error: Exception, next_step: str) -> UserError:
    """The error for `what`, which could not be read because of `error`."""
    return UserError(f"cannot read {what}: {getattr(error, 'strerror', None) or one_line(error)}; {next_step}")


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Make the folder of `path`, and turn an OSError of the `with` block, which writes `path`, into a UserError."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        at = f" ({error.filename})" if error.filename not in (None, path, str(path)) else ""
        why = error.strerror or one_line(error)
        raise UserError(f"cannot write {path}: {why}{at}; name another place") from None


def discard(path: str | Path) -> None:
    """Remove the file `path`, if there is one and it can be removed.

    For cleaning up after an error: an error of the clean-up itself, as on a read-only disk, would hide the first one.
    """
    with suppress(OSError):
        Path(path).unlink()
