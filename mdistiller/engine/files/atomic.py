"""Files that are whole or not there: written beside and renamed, with a checksum that damage does not pass."""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from ...errors import UserError

# A zip archive ends with a record of 22 bytes, the last two of them the length of a comment that follows. torch.save
# writes none and torch.load overlooks one, so the checksum of all bytes before it stands there.
_END, _END_SIZE, _LONGEST_COMMENT = b"PK\x05\x06", 22, 2**16 - 1
_MARK = b"mdistiller sha256 "
_COMMENT_SIZE = len(_MARK) + 64


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


def seal(archive: BytesIO) -> memoryview:
    """A zip archive without a comment, as bytes with its checksum at the end."""
    archive.seek(-2, os.SEEK_END)
    archive.write(_COMMENT_SIZE.to_bytes(2, "little") + _MARK)
    digest = hashlib.sha256(archive.getbuffer()).hexdigest()
    archive.write(digest.encode())
    return archive.getbuffer()


def check_seal(path: Path) -> None:
    """Check the checksum of a sealed archive; of another zip archive its records' CRCs; of other files nothing.

    Raises:
        ValueError, or whatever zipfile comes up with: the file is not as it was written.
    """
    with path.open("rb") as file:
        if file.read(2) != _END[:2]:
            return
        tail = _tail(file, _END_SIZE + _LONGEST_COMMENT)
        end = tail.rfind(_END)
        if end < 0:
            raise ValueError("the archive's end is missing")
        declared, comment = tail[end + 20 : end + 22], tail[end + _END_SIZE :]
        if not comment and declared == b"\0\0":
            _check_records(file)
        elif comment != _MARK + _sha256(file, all_but=64).encode():
            raise ValueError("its checksum does not match")


def _check_records(file: BinaryIO) -> None:
    # torch.load does not look at the CRCs that torch.save writes.
    with zipfile.ZipFile(file) as archive:
        bad = archive.testzip()
    if bad:
        raise ValueError(f"the checksum of {bad} does not match")


def _tail(file: BinaryIO, count: int) -> bytes:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - count))
    return file.read()


def _sha256(file: BinaryIO, all_but: int) -> str:
    left = file.seek(0, os.SEEK_END) - all_but
    file.seek(0)
    digest = hashlib.sha256()
    while left > 0 and (block := file.read(min(left, 2**20))):
        digest.update(block)
        left -= len(block)
    return digest.hexdigest()


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
