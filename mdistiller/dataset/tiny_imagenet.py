"""Tiny-ImageNet-200: 100,000 training and 10,000 validation images of 64x64 pixels, in the layout of its own zip."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import torch

from ..errors import UserError
from ..user_files import read_text
from ._base import get_dataloaders, missing, register
from ._original import dataloaders_with_negatives
from .augment import RotateFlip
from .decoded import read_decoded
from .folders import class_folders, labelled_files
from .in_memory import ImageArray

NUM_CLASSES = 200
SIZE = 64
MEAN = (0.4802, 0.4481, 0.3975)
STD = (0.2302, 0.2265, 0.2262)
AGAIN = "unpack tiny-imagenet-200.zip again"
AUGMENT = RotateFlip(degrees=20, size=SIZE)


@register("tiny_imagenet", num_classes=NUM_CLASSES, image_size=SIZE, model_family="tiny_imagenet", mean=MEAN, std=STD)
def read(root: Path, train: bool, skip_broken: bool = False) -> ImageArray:
    """`root`/tiny-imagenet-200: `train`/<wnid>/..., and `val` with val_annotations.txt or also with <wnid>/...

    The images are held in memory (1.2 GB for training) and cached in train.npz and val.npz next to the folders.
    """
    home = root / "tiny-imagenet-200"
    folder = home / ("train" if train else "val")
    if not os.path.isdir(folder):
        raise missing("Tiny-ImageNet", folder, f"unpack tiny-imagenet-200.zip in {root}")
    classes = _classes(home, folder)
    in_class_folders = train or any((folder / wnid).is_dir() for wnid in classes)
    files = labelled_files(folder, classes) if in_class_folders else annotated_files(folder, classes)
    paths, labels = zip(*files)
    images, intact = read_decoded(paths, SIZE, folder.with_suffix(".npz"), skip_broken)
    return ImageArray(images, torch.tensor(labels)[intact], MEAN, STD, AUGMENT, tuple(classes))


def _classes(home: Path, folder: Path) -> list[str]:
    """The sorted wnids: from wnids.txt, or if it is missing from the names of the class folders."""
    listed = home / "wnids.txt"
    if not listed.is_file():
        return class_folders(home / "train" if (home / "train").is_dir() else folder, NUM_CLASSES)
    wnids = sorted(set(read_text(listed, "class list", AGAIN).split()))
    if len(wnids) != NUM_CLASSES:
        raise UserError(f"{listed} lists {len(wnids)} classes, expected {NUM_CLASSES}; {AGAIN}")
    return wnids


def annotated_files(part: Path, classes: list[str]) -> list[tuple[str, int]]:
    """(path, label) of the images that `part`/val_annotations.txt lists: a line holds file, wnid and a box."""
    annotations = part / "val_annotations.txt"
    if not annotations.is_file():
        raise missing("Tiny-ImageNet's val_annotations.txt", annotations, AGAIN)
    label = {wnid: i for i, wnid in enumerate(classes)}
    files = []
    for number, line in enumerate(read_text(annotations, "annotations", AGAIN).splitlines(), start=1):
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in label:
            raise UserError(f"{annotations}, line {number}: {wnid!r} is not a class; a line must hold file, wnid, box")
        files.append((str(part / "images" / name), label[wnid]))
    if not files:
        raise UserError(f"{annotations} lists no image; {AGAIN}")
    return files


# The names from the original code.
get_tinyimagenet_dataloader = partial(get_dataloaders, "tiny_imagenet")
get_tinyimagenet_dataloader_sample = partial(dataloaders_with_negatives, "tiny_imagenet")
