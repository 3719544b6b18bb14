"""Atomic file writes: a file is written under another name, flushed to the disk, then renamed."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from ...errors import UserError
from ...user_files import discard


class SaveError(UserError):
    """A file could not be written: disk full, quota, read-only or vanished folder. The previous file is intact."""


def write_whole(data: bytes | memoryview, path: Path, previous: Path | None = None) -> None:
    """Write `data` to `path` atomically: even if the process is killed, `path` is the old file or the new one.

    Args:
        previous: path under which to keep the replaced file, or None. `path` exists at every moment.

    Raises:
        SaveError: the write failed; says why, how many bytes were needed and how many are free.
    """
    # A fixed name, not a random one: the next save overwrites what a killed run has left.
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
            discard(partial)
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
    """Make `second` a hard link to the file at `path`, or a copy if the file system has no hard links."""
    spare = _partial(second)
    spare.unlink(missing_ok=True)
    try:
        try:
            os.link(path, spare)
        except OSError:
            shutil.copyfile(path, spare)
        os.replace(spare, second)
    finally:
        # If `second` already was a link to the same file, os.replace does nothing and `spare` remains.
        discard(spare)


def _sync_folder(folder: Path) -> None:
    """Flush the folder's new entry to the disk; some file systems do not support this."""
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
