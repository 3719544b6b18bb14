"""Tar archives: checked as a whole before a byte is written, then unpacked under another name and renamed.

Where another library unpacks archives itself, `filtered` keeps it from writing outside of its folder.
"""

from __future__ import annotations

import errno
import os
import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from ..console import one_line
from ..errors import UserError
from ..system import own_ids


class ArchiveError(UserError):
    """An archive that is not unpacked; says why."""


def unpack(archive: Path, folder: Path, files: Sequence[str]) -> None:
    """Write the `files` of an archive's top folder `folder.name` to `folder`, and none of its other members.

    A `folder` that is missing appears whole or not at all, even if the process is killed; in one that exists, file
    after file is replaced. The files are this user's own, with mode 644, whatever the archive says.

    Raises:
        ArchiveError: the archive is damaged, lacks one of the files, or has a member that could lead outside; nothing
            has been written.
        OSError: a file cannot be read or written.
    """
    target = folder.resolve()  # it may be a link to another disk
    try:
        with tarfile.open(archive) as tar:
            chosen = _chosen(tar, archive, [f"{folder.name}/{name}" for name in files])
            target.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(prefix=f".{folder.name}.", dir=target.parent, ignore_cleanup_errors=True) as beside:
                # Python before 3.10.12 and 3.11.4 has no filters; `_chosen` leaves nothing for this one to change.
                tar.extraction_filter = getattr(tarfile, "data_filter", None)
                tar.extractall(beside, chosen)
                _move(Path(beside) / folder.name, target, files)
    except ArchiveError:
        raise
    except Exception as error:  # on damaged bytes tarfile and the decompressors raise nearly anything
        if isinstance(error, OSError) and error.errno is not None:  # of the disk; the decompressors' have no number
            raise
        reason = one_line(error, 200) or type(error).__name__
        raise ArchiveError(f"{archive} is damaged ({reason}); delete it and fetch it again") from None


@contextmanager
def filtered() -> Iterator[None]:
    """Within it, tarfile refuses members that lead outside or are no files, for whoever unpacks an archive by it.

    Python before 3.10.12 and 3.11.4 has no filters, and refuses nothing. zipfile always stays inside. Not thread-safe.
    """
    own = vars(tarfile.TarFile).get("extraction_filter")
    data = getattr(tarfile, "data_filter", None)
    if data is None:
        yield
        return
    tarfile.TarFile.extraction_filter = staticmethod(data)  # type: ignore[assignment]
    try:
        yield
    finally:
        tarfile.TarFile.extraction_filter = own  # type: ignore[assignment]


def _chosen(tar: tarfile.TarFile, archive: Path, files: Sequence[str]) -> list[tarfile.TarInfo]:
    """The members of the names `files`, without what the archive says of their owners and modes.

    Raises:
        ArchiveError: one of them is missing, or any member of the archive is unsafe.
    """
    members = tar.getmembers()
    while tar.fileobj is not None and tar.fileobj.read(2**20):
        pass  # up to the checksum at the end of a compressed archive
    plain = {posixpath.normpath(member.name): member for member in members if member.isreg()}
    faults = [*_unsafe(members), *(f"has no file {name}" for name in files if name not in plain)]
    if faults:
        raise ArchiveError(f"{archive} is not unpacked: it {'; it '.join(faults[:3])}; delete it and fetch it again")
    for name in files:
        member = plain[name]
        member.name, member.mode = name, 0o644
        (member.uid, member.gid), member.uname, member.gname = own_ids(), "", ""
    return [plain[name] for name in files]


def _unsafe(members: Sequence[tarfile.TarInfo]) -> Iterator[str]:
    """What is wrong with the members of an archive: names and links that lead outside, and what is no file."""
    no_folders = {posixpath.normpath(member.name) for member in members if not member.isdir()}
    for member in members:
        name, path = repr(member.name[:100]), PurePosixPath(member.name)
        # A symbolic link leads on from its own folder, a hard link from the archive's top.
        start = posixpath.dirname(member.name) if member.issym() else ""
        leads_to = PurePosixPath(posixpath.normpath(posixpath.join(start, member.linkname)))
        if path.is_absolute() or ".." in path.parts:
            yield f"holds {name}, which lies outside"
        elif (member.issym() or member.islnk()) and (leads_to.is_absolute() or ".." in leads_to.parts):
            yield f"holds {name}, a link to {member.linkname[:100]!r}, which lies outside"
        elif not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
            yield f"holds {name}, which is neither file, folder nor link"
        elif not no_folders.isdisjoint(map(str, path.parents)):
            yield f"holds {name} below something that is no folder"


def _move(fresh: Path, target: Path, files: Sequence[str]) -> None:
    """Rename the folder `fresh` to `target`; where a folder with files stands, replace the `files` in it."""
    try:
        os.rename(fresh, target)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(fresh / name, target / name)
