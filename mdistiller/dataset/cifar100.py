"""CIFAR-100: 50,000 training and 10,000 test images of 32x32 pixels in 100 classes."""

from __future__ import annotations

import io
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from http.client import HTTPException
from pathlib import Path
from tarfile import TarError

import torch
from torchvision.datasets import CIFAR100

from ._base import get_dataloaders, missing, register
from .in_memory import ImageArray

MEAN = (0.5071, 0.4867, 0.4408)
STD = (0.2675, 0.2565, 0.2761)
TIMEOUT = 10.0  # seconds without an answer from the server


@register("cifar100", num_classes=100, image_size=32, model_family="cifar")
def read(root: Path, train: bool, skip_broken: bool = False) -> ImageArray:
    """`root`/cifar-100-python, downloaded when it is not there or its checksum is wrong.

    Its images are bytes in one checked file: none is broken alone.
    """
    try:
        data = CIFAR100(root, train)
    except RuntimeError:
        _download(root)
        data = CIFAR100(root, train)
    return ImageArray(torch.from_numpy(data.data), torch.tensor(data.targets), MEAN, STD)


def _download(root: Path) -> None:
    """Bring the archive; torchvision checks its sum before it unpacks, and unpacks nothing outside `root`."""
    try:
        with _quiet():
            CIFAR100(root, download=True)
    except (OSError, HTTPException, RuntimeError, TarError) as error:
        how = f"it is missing or its checksum is wrong, and the download failed ({error}); copy the folder there"
        raise missing("CIFAR-100", root / CIFAR100.base_folder, how) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Torchvision's download without its messages, with its bar on a terminal only, and without endless waiting."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(sys.stderr if sys.stderr.isatty() else io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(before)


# The original's name.
get_cifar100_dataloaders = partial(get_dataloaders, "cifar100")
