"""Files that a user names: an error of the disk or of the content becomes a UserError that names the file."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from .console import one_line
from .errors import UserError

_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # that of UTF-32 LE begins as the first
_ASCII_TEXT = bytes(range(0x20, 0x7F)) + b"\t\n\r\f"


def read_text(path: str | Path, what: str, next_step: str) -> str:
    """The text of the file `path`.

    Args:
        what: the kind of file, such as "config".
        next_step: what the user can do about an error.

    Raises:
        UserError: it cannot be read, or it is not text in UTF-8. (A byte-order mark of UTF-8 is taken and left out.)
    """
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise unreadable(f"{what} {path}", error, next_step) from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        why, text = f"{error.reason} at byte {error.start}", "\0"
    else:
        why = f"a null byte at byte {content.find(0)}"
    if "\0" not in text:
        return text.replace("\r\n", "\n").replace("\r", "\n")
    other = _other_encoding(content)
    if other:
        raise UserError(f"{what} {path} is not in UTF-8 ({why}) but in {other}; save it in UTF-8, or {next_step}")
    raise UserError(f"{what} {path} is not a text file ({why}); {next_step}")


def _other_encoding(content: bytes) -> str:
    """What text that is not in UTF-8 is likely in; "" if it looks like no text."""
    for encoding in ("utf-32", "utf-16"):
        if content.startswith(_MARKS) and _decodes(content, encoding):
            return encoding.upper()
    halves = content[::2], content[1::2]
    if any(half and not half.strip(b"\0") for half in halves):  # ASCII without a mark: every other byte is null
        return "UTF-16"
    unusual = content.translate(None, _ASCII_TEXT)
    looks_like_text = min(unusual, default=0) >= 0x80 and 4 * len(unusual) <= len(content)
    return "another encoding, such as Latin-1" if looks_like_text else ""


def _decodes(content: bytes, encoding: str) -> bool:
    try:
        return bool(content.decode(encoding))
    except UnicodeDecodeError:
        return False


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
