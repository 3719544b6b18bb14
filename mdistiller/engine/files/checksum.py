"""SHA-256 checksums: in a zip archive, the format of torch.save, so that reading finds damage; and of weights."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import torch
import torch.nn as nn
from torch import Tensor

# A zip archive ends with a record of 22 bytes, whose last two are the length of a comment that follows. torch.save
# writes no comment and torch.load ignores it, so the comment holds the checksum of all bytes before it.
_END, _END_SIZE, _LONGEST_COMMENT = b"PK\x05\x06", 22, 2**16 - 1
_MARK = b"mdistiller sha256 "
_COMMENT_SIZE = len(_MARK) + 64


def seal(archive: BytesIO) -> memoryview:
    """The bytes of a zip archive that has no comment, with its checksum added as the comment."""
    archive.seek(-2, os.SEEK_END)
    archive.write(_COMMENT_SIZE.to_bytes(2, "little") + _MARK)
    digest = hashlib.sha256(archive.getbuffer()).hexdigest()
    archive.write(digest.encode())
    return archive.getbuffer()


def check_seal(path: Path) -> bool:
    """Check a sealed archive's checksum, or the CRCs of any other zip archive; other files are not checked.

    Returns:
        Whether the file is sealed.

    Raises:
        ValueError, or any exception of zipfile: the file is damaged.
    """
    with path.open("rb") as file:
        if file.read(2) != _END[:2]:
            return False
        tail = _tail(file, _END_SIZE + _LONGEST_COMMENT)
        end = tail.rfind(_END)
        if end < 0:
            raise ValueError("the archive's end is missing")
        declared, comment = tail[end + 20 : end + 22], tail[end + _END_SIZE :]
        if not comment and declared == b"\0\0":
            _check_records(file)
            return False
        if comment != _MARK + _sha256(file, all_but=64).encode():
            raise ValueError("its checksum does not match")
    return True


def weights_digest(network: nn.Module, about: str = "") -> str:
    """A digest of `about` and of a network's state: names, shapes, types and values, wherever the tensors lie.

    What a module keeps in its state beside tensors is left out.
    """
    return tensors_digest({k: v for k, v in network.state_dict().items() if isinstance(v, Tensor)}, about)


def tensors_digest(tensors: Mapping[str, Tensor], about: str = "") -> str:
    """A digest of `about` and of named tensors; safetensors files that exist hold it, so it must stay as it is."""
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # as bytes: numpy does not know bfloat16
    return digest.hexdigest()


def _check_records(file: BinaryIO) -> None:
    # torch.load does not check the CRCs that torch.save writes.
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
