"""What a file is that was named as a checkpoint and is none, told from its first bytes."""

from __future__ import annotations

import re
import tarfile
import zipfile
from pathlib import Path

from .safetensors_file import SUFFIX

# The number with which torch.save begins a file in its format before zip, within the first bytes of its pickle.
_MAGIC_NUMBER = bytes.fromhex("6cfc9c46f9206aa85019")

_UNPACK = "unpack it, and name the file inside"
_BY_FIRST_BYTES = {
    b"\x1f\x8b": f"a file compressed by gzip; {_UNPACK}",
    b"BZh": f"a file compressed by bzip2; {_UNPACK}",
    b"\xfd7zXZ": f"a file compressed by xz; {_UNPACK}",
    b"\x28\xb5\x2f\xfd": f"a file compressed by zstd; {_UNPACK}",
    b"7z\xbc\xaf": f"a 7z archive; {_UNPACK}",
    b"Rar!": f"a rar archive; {_UNPACK}",
    b"\x89HDF": "an HDF5 file, as Keras writes; only weights of PyTorch can be read",
    b"\x93NUMPY": "a NumPy array; only named weights of PyTorch can be read",
}
_BY_FIRST_WORDS = {
    r"version https://git-lfs": "a pointer of Git LFS, which stands for the file; fetch the file by `git lfs pull`",
    r"(?i)<(!doctype html|html|head|body|script|meta)": (
        "a web page, which was saved instead of the file; download it again by the link of the file itself"
    ),
    r"(?i)<\?xml": "an XML text, often a server's error message; download the file again",
    r"[{\[]": "a JSON text, not the weights that it may describe; name the file of the weights",
}


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do, with a header's length and a `{`; or is only called so."""
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{" and 2 <= int.from_bytes(start[:8], "little") <= path.stat().st_size - 8:
        return True
    return path.suffix == SUFFIX and not start.startswith((b"PK", b"\x80")) and not other_kind(path)


def other_kind(path: Path) -> str:
    """What the file at `path` is, and what to do; "" if it may be a checkpoint of torch.save."""
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return "an empty file; download or copy it again"
    for first, words in _BY_FIRST_BYTES.items():
        if start.startswith(first):
            return words
    if start.startswith(b"PK"):
        return _kind_of_archive(path)
    if tarfile.is_tarfile(path):
        return f"a tar archive; {_UNPACK}"
    if start.startswith(b"\x80"):
        return "" if _MAGIC_NUMBER in start[:20] else (
            "a pickle that torch.save did not write; load it where you trust it, and torch.save its weights"
        )  # fmt: skip
    return _kind_of_text(start)


def _kind_of_archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return ""  # torch says what is wrong
    records = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in records:
        return "a TorchScript program, of torch.jit.save; save the network's state_dict() by torch.save instead"
    if "data.pkl" in records:
        return ""
    if "archive_format" in records:
        return "a program of torch.export; save the network's state_dict() by torch.save instead"
    return f"a zip archive of {', '.join(names[:3]) or 'nothing'}{', ...' if len(names) > 3 else ''}; {_UNPACK}"


def _kind_of_text(start: bytes) -> str:
    try:
        text = start.decode(errors="strict" if len(start) < 512 else "ignore").lstrip("\ufeff \t\r\n")
    except UnicodeDecodeError:
        return ""
    for words, kind in _BY_FIRST_WORDS.items():
        if re.match(words, text):
            return kind
    return "" if re.search(r"[\x00-\x08\x0e-\x1f]", text) else "a text file; name the file of the weights"
