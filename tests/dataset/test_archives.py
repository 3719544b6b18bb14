"""Archives: what is unsafe, damaged or incomplete is refused by name, and nothing at all is written."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from mdistiller.dataset.archives import ArchiveError, unpack

from .._processes import REPOSITORY

FILES = {"set/one": b"1" * 5000, "set/two": b"2" * 70}


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", **facts: Any) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, link
    for key, value in facts.items():
        setattr(made, key, value)
    return made


def pack(path: Path, *others: tarfile.TarInfo, files: dict[str, bytes] = FILES, last: bool = False) -> Path:
    """An archive of `files` and of the `others` before, or after (`last`), them."""
    with tarfile.open(path, "w:gz") as tar:
        for other in () if last else others:
            tar.addfile(other, io.BytesIO(bytes(other.size)))
        for name, content in files.items():
            tar.addfile(member(name, size=len(content)), io.BytesIO(content))
        for other in others if last else ():
            tar.addfile(other, io.BytesIO(bytes(other.size)))
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(params=["data filter", "no filter"])
def python(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """This Python's tarfile, and that of a Python before 3.10.12 or 3.11.4."""
    if request.param == "no filter":
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
        if hasattr(tarfile, "fully_trusted_filter"):  # what such a Python does
            trusting = staticmethod(tarfile.fully_trusted_filter)
            monkeypatch.setattr(tarfile.TarFile, "_get_filter_function", lambda self, given: trusting.__func__)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The folder of the data sets; beside it stands what an archive must not reach."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_bytes(b"kept")
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def test_the_files_asked_for_are_unpacked_and_no_others(python: None, place: Path) -> None:
    archive = pack(place.parent / "a.tgz", member("set", tarfile.DIRTYPE, mode=0o700), member("set/other", size=9))
    unpack(archive, place / "set", ["one", "two"])
    assert tree(place) == FILES and [p.name for p in place.iterdir()] == ["set"]


def test_owners_and_permissions_are_not_the_archive_s(python: None, place: Path) -> None:
    """Set-uid, of user 12345: root would give the file away."""
    others = member("set/one", mode=0o6777, uid=12345, gid=12345, uname="games", size=4)
    unpack(pack(place.parent / "a.tgz", others, files={"set/two": b"2"}), place / "set", ["one", "two"])
    found = (place / "set" / "one").stat()
    assert (found.st_mode & 0o7777, found.st_uid, found.st_gid) == (0o644, os.getuid(), os.getgid())


def test_names_that_begin_with_a_dot_are_the_same(python: None, place: Path) -> None:
    files = {f"./{name}": content for name, content in FILES.items()}
    unpack(pack(place.parent / "a.tgz", member(".", tarfile.DIRTYPE), files=files), place / "set", ["one", "two"])
    assert tree(place) == FILES


UNSAFE = {
    "a name above": (member("../outside", size=3), r"holds '\.\./outside', which lies outside"),
    "a name above, in the folder": (member("set/../../outside", size=3), r"'set/\.\./\.\./outside', which lies out"),
    "an absolute name": (member("/tmp/mdistiller-outside", size=3), "'/tmp/mdistiller-outside', which lies outside"),
    "a link out": (member("set/three", tarfile.SYMTYPE, "../../elsewhere"), "'set/three', a link to '../../elsewhere'"),
    "an absolute link": (member("set/three", tarfile.SYMTYPE, "/etc/passwd"), "'set/three', a link to '/etc/passwd'"),
    "a hard link out": (member("set/three", tarfile.LNKTYPE, "../elsewhere/kept"), "'set/three', a link to"),
    "an absolute hard link": (member("set/three", tarfile.LNKTYPE, "/etc/passwd"), "'set/three', a link to '/etc/pass"),
    "the folder a link": (member("set", tarfile.SYMTYPE, "inside"), "'set/one' below something that is no folder"),
    "the folder a link out": (member("set", tarfile.SYMTYPE, "../elsewhere"), "'set', a link to '../elsewhere'"),
    "the folder a file": (member("set", size=3), "'set/one' below something that is no folder"),
    "a device": (member("set/null", tarfile.CHRTYPE, devmajor=1, devminor=3), "'set/null', which is neither file"),
    "a disk": (member("disk", tarfile.BLKTYPE, devmajor=8), "'disk', which is neither file"),
    "a pipe": (member("set/pipe", tarfile.FIFOTYPE), "'set/pipe', which is neither file"),
}


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("case", UNSAFE)
def test_an_unsafe_member_is_named_and_nothing_is_written(case: str, last: bool, python: None, place: Path) -> None:
    other, message = UNSAFE[case]
    archive = pack(place.parent / "a.tgz", other, last=last)
    before = tree(place.parent)
    with pytest.raises(ArchiveError, match=rf"a\.tgz is not unpacked: .*{message}") as error:
        unpack(archive, place / "set", ["one", "two"])
    assert tree(place.parent) == before and not list(place.iterdir()) and "\n" not in str(error.value)
    assert not Path("/tmp/mdistiller-outside").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, None])
def test_a_file_that_is_missing_or_a_link_is_named(kind: bytes | None, python: None, place: Path) -> None:
    others = () if kind is None else (member("set/two", kind, "one" if kind == tarfile.SYMTYPE else "set/one"),)
    archive = pack(place.parent / "a.tgz", *others, files={"set/one": b"1"}, last=True)
    with pytest.raises(ArchiveError, match=r"a\.tgz is not unpacked: it has no file set/two"):
        unpack(archive, place / "set", ["one", "two"])
    assert not list(place.iterdir())


def test_links_within_the_archive_are_harmless(python: None, place: Path) -> None:
    others = member("set/three", tarfile.SYMTYPE, "one"), member("set/four", tarfile.LNKTYPE, "set/one")
    unpack(pack(place.parent / "a.tgz", *others, last=True), place / "set", ["one", "two"])
    assert tree(place) == FILES


def test_a_cut_or_damaged_archive_leaves_nothing(python: None, place: Path) -> None:
    """At every byte, cut there or with a bit turned there: refused in one line, or unpacked with the right content."""
    archive = pack(place.parent / "a.tgz")
    whole, refused = archive.read_bytes(), 0
    for at in range(len(whole)):
        for content in (whole[:at], whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :]):
            archive.write_bytes(content)
            try:
                unpack(archive, place / "set", ["one", "two"])
            except ArchiveError as error:
                refused += 1
                assert "\n" not in str(error) and not list(place.iterdir()), at
            else:
                assert tree(place) == FILES, at
                for name in FILES:
                    (place / name).unlink()
                (place / "set").rmdir()
    assert refused > 1.9 * len(whole)  # some bits of gzip's header say nothing


def test_a_missing_archive_is_the_disk_s_error(place: Path) -> None:
    with pytest.raises(FileNotFoundError):
        unpack(place / "none.tgz", place / "set", ["one"])


def test_what_stands_in_the_folder_is_replaced_file_by_file(python: None, place: Path) -> None:
    (place / "set").mkdir()
    (place / "set" / "one").write_bytes(b"half")
    (place / "set" / "own").write_bytes(b"the user's")
    unpack(pack(place.parent / "a.tgz"), place / "set", ["one", "two"])
    assert tree(place) == {**FILES, "set/own": b"the user's"}


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_that_is_a_link_is_filled_where_it_leads(exists: bool, python: None, place: Path) -> None:
    big = place.parent / "big disk" / "set"
    big.parent.mkdir()
    if exists:
        big.mkdir()
    (place / "set").symlink_to(big)
    unpack(pack(place.parent / "a.tgz"), place / "set", ["one", "two"])
    assert tree(big.parent) == FILES and (place / "set").is_symlink()


def test_a_file_in_place_of_the_folder_stays(python: None, place: Path) -> None:
    (place / "set").write_bytes(b"a file")
    with pytest.raises(NotADirectoryError):
        unpack(pack(place.parent / "a.tgz"), place / "set", ["one", "two"])
    assert tree(place) == {"set": b"a file"}


KILLED = """
import os, sys, tarfile
from pathlib import Path
from mdistiller.dataset import archives
move = tarfile.TarFile.makefile
def slow(self, *args):
    move(self, *args)
    print("one file is written", flush=True)
    sys.stdin.read()
tarfile.TarFile.makefile = slow
archives.unpack(Path(sys.argv[1]), Path(sys.argv[2]), ["one", "two"])
"""


def test_a_kill_leaves_no_half_data_set(place: Path) -> None:
    archive = pack(place.parent / "a.tgz")
    command = [sys.executable, "-c", KILLED, str(archive), str(place / "set")]
    started = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None and started.stdout.readline() == "one file is written\n"
    started.send_signal(signal.SIGKILL)
    started.communicate()
    assert not (place / "set").exists()
    unpack(archive, place / "set", ["one", "two"])
    assert {p.name: p.read_bytes() for p in (place / "set").iterdir()} == {"one": b"1" * 5000, "two": b"2" * 70}
