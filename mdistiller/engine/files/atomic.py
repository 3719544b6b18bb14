"""Files that are whole or not there: written under another name, flushed to the disk, then renamed."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from ...errors import UserError


class SaveError(UserError):
    """A file could not be written: disk full, quota, read-only or vanished folder. What was there before is whole."""


def write_whole(data: bytes | memoryview, path: Path, previous: Path | None = None) -> None:
    """Write `data` to `path`; a reader, or a run that is killed, finds the old file or the new one, never a part.

    Args:
        previous: where the file that is replaced is kept, if anywhere; at no moment is `path` missing.

    Raises:
        SaveError: says why, how many bytes were needed and how many are free.
    """
    # One name, not a random one: what a killed run leaves of it, the next save takes away.
    partial = _partial(path)
    try:
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if previous is not None and path.exists():
                _second_name(path, previous)
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
    except OSError as error:
        raise SaveError(
            f"cannot write {path} ({error.strerror or error}): {len(data):,} bytes needed, {_free(path.parent)}; "
            "what was saved before is kept"
        ) from None
    _sync_folder(path.parent)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _second_name(path: Path, second: Path) -> None:
    """Let `second` be the file at `path` too; by a copy where the file system has no hard links."""
    spare = _partial(second)
    spare.unlink(missing_ok=True)
    try:
        try:
            os.link(path, spare)
        except OSError:
            shutil.copyfile(path, spare)
        os.replace(spare, second)
    finally:
        # Renaming one name of a file to another of the same file does nothing.
        spare.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Have the folder's new entry on the disk; some file systems cannot."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free:,} free in {folder}"
    except OSError:
        return f"and {folder} cannot be reached"
