"""Data sets by name, and the loaders of their batches."""

from __future__ import annotations

from pathlib import Path

from yacs.config import CfgNode as CN

from ..paths import expanded
from . import digits, folder, huggingface, torchvision_sets, unlabelled  # noqa: F401  (they register themselves)
from ._base import (
    DatasetInfo,
    Loader,
    Split,
    check_class_names,
    configured_dict,
    dataset_dict,
    get_dataloaders,
    info_of,
    stratified_split,
)
from .batch import fields_of, named_batch
from .cifar100 import get_cifar100_dataloaders, get_cifar100_dataloaders_sample
from .imagenet import get_imagenet_dataloaders, get_imagenet_dataloaders_sample, get_imagenet_val_loader
from .in_memory import ImageArray, InMemoryLoader
from .own_loader import OWN_LOADER
from .tiny_imagenet import get_tinyimagenet_dataloader, get_tinyimagenet_dataloader_sample

# The same registry, named after what its entries hold: num_classes, image_size, model_family.
dataset_info = dataset_dict


def get_dataset(cfg: CN) -> tuple[Loader, Loader, int, int]:
    """Training loader, validation loader, number of training images and of classes; see `get_dataloaders`.

    Args:
        cfg: the config tree; DATASET, SOLVER.BATCH_SIZE and EXPERIMENT.SEED are read.

    Raises:
        UserError: no such data set, or its data is missing or unreadable.
    """
    info = info_of(cfg)
    loaders = get_dataloaders(
        cfg.DATASET.TYPE,
        batch_size=cfg.SOLVER.BATCH_SIZE,
        val_batch_size=cfg.DATASET.TEST.BATCH_SIZE,
        num_workers=cfg.DATASET.NUM_WORKERS,
        root=cfg.DATASET.ROOT,
        seed=cfg.EXPERIMENT.SEED,
        train_fraction=cfg.DATASET.TRAIN_FRACTION,
        val_fraction=cfg.DATASET.VAL_FRACTION,
        skip_broken=cfg.DATASET.SKIP_BROKEN,
        augment=cfg.DATASET.get("AUGMENT", ""),  # a tree of the original has none
        info=info,
    )
    return *loaders, info.num_classes


def get_val_loader(
    name: str | DatasetInfo,
    root: str = "./data",
    batch_size: int = 64,
    num_workers: int = 2,
    train: bool = False,
    skip_broken: bool = False,
) -> Loader:
    """A loader of the test images of a data set, or (`train`) of its training images, in order, not augmented.

    Args:
        name: of a data set of fixed facts, or any data set's facts (`info_of`).
        skip_broken: leave out images that cannot be read, with a warning.

    Raises:
        UserError: no such data set, or its data is missing or unreadable.
    """
    info: DatasetInfo = dataset_dict[name] if isinstance(name, str) else name
    where, scored = Path(expanded(root)), None if train else info.scored
    split = info.read(where, train, skip_broken) if scored is None else scored(where, skip_broken)
    return split.loader(batch_size, num_workers, train=False)


__all__ = [
    "OWN_LOADER",
    "DatasetInfo",
    "ImageArray",
    "InMemoryLoader",
    "Loader",
    "Split",
    "check_class_names",
    "configured_dict",
    "dataset_dict",
    "dataset_info",
    "fields_of",
    "get_cifar100_dataloaders",
    "get_cifar100_dataloaders_sample",
    "get_dataloaders",
    "get_dataset",
    "get_imagenet_dataloaders",
    "get_imagenet_dataloaders_sample",
    "get_imagenet_val_loader",
    "get_tinyimagenet_dataloader",
    "get_tinyimagenet_dataloader_sample",
    "get_val_loader",
    "info_of",
    "named_batch",
    "stratified_split",
]
