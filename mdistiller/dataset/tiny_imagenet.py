"""Tiny-ImageNet-200: 100,000 training and 10,000 validation images of 64x64 pixels, in the layout of its own zip."""

from __future__ import annotations

import os
from collections import Counter
from functools import partial
from pathlib import Path

import torch

from ..errors import UserError
from ..user_files import read_text
from ._base import get_dataloaders, missing, register
from ._original import dataloaders_with_negatives
from .augment import RotateFlip
from .decoded import read_decoded
from .in_memory import ImageArray
from .listing import LabelledFiles, class_list, files_of_split, folders_in, some

NUM_CLASSES = 200
SIZE = 64
IMAGES = {"train": 100_000, "val": 10_000}
MEAN = (0.4802, 0.4481, 0.3975)
STD = (0.2302, 0.2265, 0.2262)
ANNOTATIONS = "val_annotations.txt"
AGAIN = "unpack tiny-imagenet-200.zip again"
AUGMENT = RotateFlip(degrees=20, size=SIZE)


@register("tiny_imagenet", num_classes=NUM_CLASSES, image_size=SIZE, model_family="tiny_imagenet", mean=MEAN, std=STD)
def read(root: Path, train: bool, skip_broken: bool = False) -> ImageArray:
    """`root`/tiny-imagenet-200: `train`/<wnid>/..., and `val` with val_annotations.txt or also with <wnid>/...

    The images are held in memory (1.2 GB for training) and cached in train.npz and val.npz next to the folders.
    """
    home, part = root / "tiny-imagenet-200", "train" if train else "val"
    if not os.path.isdir(home / part):
        raise missing("Tiny-ImageNet", home / part, f"unpack tiny-imagenet-200.zip in {root}")
    classes, val = _classes(home), home / "val"
    annotated = None if _in_class_folders(val, classes) else annotated_files(val, classes)
    if not train and not annotated and set(folders_in(val)) <= {"images"}:
        raise missing("Tiny-ImageNet's val_annotations.txt", val / ANNOTATIONS, AGAIN)
    files = files_of_split(home, part, classes, IMAGES, annotated)
    paths, labels = zip(*files)
    images, intact = read_decoded(paths, SIZE, home / f"{part}.npz", skip_broken)
    return ImageArray(images, torch.tensor(labels)[intact], MEAN, STD, AUGMENT, tuple(classes))


def _classes(home: Path) -> list[str]:
    """The sorted wnids: from wnids.txt, or if it is missing from the names of the class folders."""
    train, val, list_file = home / "train", home / "val", home / "wnids.txt"
    listed = (list_file, _listed(list_file)) if list_file.is_file() else None
    known = listed[1] if listed else folders_in(train) if os.path.isdir(train) else []
    splits = [train, val] if _in_class_folders(val, known) else [train]
    return class_list(splits, NUM_CLASSES, listed, besides={"images"})


def _listed(file: Path) -> list[str]:
    words = Counter(read_text(file, "class list", AGAIN).split())
    if len(words) != NUM_CLASSES:
        twice = [word for word, count in words.items() if count > 1]
        also = f", and {some(twice, 'name')} more than once" if twice else ""
        raise UserError(f"{file} lists {len(words)} classes, expected {NUM_CLASSES}{also}; {AGAIN}")
    return sorted(words)


def _in_class_folders(val: Path, classes: list[str]) -> bool:
    return not (val / ANNOTATIONS).is_file() or any(os.path.isdir(val / wnid) for wnid in classes)


def annotated_files(part: Path, classes: list[str]) -> LabelledFiles:
    """(path, label) of the images that `part`/val_annotations.txt lists: a line holds file, wnid and a box."""
    annotations = part / ANNOTATIONS
    label = {wnid: i for i, wnid in enumerate(classes)}
    files = []
    for number, line in enumerate(read_text(annotations, "annotations", AGAIN).splitlines(), start=1):
        if not line.strip():
            continue
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in label:
            raise UserError(f"{annotations}, line {number}: {wnid!r} is not a class; a line must hold file, wnid, box")
        files.append((str(part / "images" / name), label[wnid]))
    if not files:
        raise UserError(f"{annotations} lists no image; {AGAIN}")
    return LabelledFiles(files, classes)


# The names from the original code.
get_tinyimagenet_dataloader = partial(get_dataloaders, "tiny_imagenet")
get_tinyimagenet_dataloader_sample = partial(dataloaders_with_negatives, "tiny_imagenet")
