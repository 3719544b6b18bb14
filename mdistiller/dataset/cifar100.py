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

import torch
from torchvision import transforms
from torchvision.datasets import CIFAR100
from torchvision.datasets.utils import download_url

from ..user_files import reading
from ._base import get_dataloaders, missing, register
from ._original import dataloaders_with_negatives, to_normalized
from .archives import ArchiveError, unpack
from .in_memory import ImageArray

MEAN = (0.5071, 0.4867, 0.4408)
STD = (0.2675, 0.2565, 0.2761)
TIMEOUT = 10.0  # seconds without an answer from the server


@register("cifar100", num_classes=100, image_size=32, model_family="cifar", mean=MEAN, std=STD)
def read(root: Path, train: bool, skip_broken: bool = False) -> ImageArray:
    """`root`/cifar-100-python, downloaded when it is not there or its checksum is wrong.

    Its images are bytes in one checked file: none is broken alone.
    """
    with reading(f"CIFAR-100 in {root / CIFAR100.base_folder}", "let this user read it, or copy it there again"):
        try:
            data = CIFAR100(root, train)
        except RuntimeError:
            _download(root)
            data = CIFAR100(root, train)
    images, targets = torch.from_numpy(data.data), torch.tensor(data.targets)
    return ImageArray(images, targets, MEAN, STD, class_names=tuple(data.classes))


def _download(root: Path) -> None:
    """Fetch the archive, check its checksum, and unpack the data set's files."""
    try:
        with quiet_download():
            download_url(CIFAR100.url, root, CIFAR100.filename, CIFAR100.tgz_md5)
        files = [name for name, _ in CIFAR100.train_list + CIFAR100.test_list] + [CIFAR100.meta["filename"]]
        unpack(root / CIFAR100.filename, root / CIFAR100.base_folder, files)
    except (OSError, HTTPException, RuntimeError, ArchiveError) as error:
        how = f"it is missing or its checksum is wrong, and the download failed ({error}); copy the folder there"
        raise missing("CIFAR-100", root / CIFAR100.base_folder, how) from error


@contextmanager
def quiet_download() -> Iterator[None]:
    """Torchvision's downloads without its messages, with its bar on a terminal only, and without endless waiting."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(sys.stderr if sys.stderr.isatty() else io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(before)


# The original's names, here and below.
get_cifar100_dataloaders = partial(get_dataloaders, "cifar100")
get_cifar100_dataloaders_sample = partial(dataloaders_with_negatives, "cifar100")


def get_cifar100_train_transform() -> transforms.Compose:
    """The augmentation of the training images, for PIL images; the loader does the same a batch at a time."""
    return to_normalized(MEAN, STD, transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip())


def get_cifar100_test_transform() -> transforms.Compose:
    """The normalisation of the test images, for PIL images."""
    return to_normalized(MEAN, STD)
