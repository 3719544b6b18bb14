"""ImageNet (ILSVRC 2012): class folders of images, in 1,000 classes, seen at 224x224 pixels, or as `at` says."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

from torch import Tensor
from torchvision import transforms
from torchvision.transforms import v2

from ..models.native import NativeInput
from ..paths import expanded
from ._base import DatasetInfo, Loader, dataset_dict, get_dataloaders, missing, register
from ._original import dataloaders_with_negatives, to_normalized
from .augmentation import FileView, PixelTransform
from .folders import ImageFiles
from .image_file import read_image, read_pixels, to_pixels
from .listing import class_list, files_of_split

NUM_CLASSES = 1000
IMAGES = {"train": 1_281_167, "val": 50_000}
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
TRAIN = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()])
VAL = v2.Compose([v2.Resize(256), v2.CenterCrop(224)])


# A random crop of the image, mirrored at random, resized as a tensor: (224, 224, 3) uint8.
train_view = FileView(read_pixels, PixelTransform(TRAIN))


def val_view(path: str) -> Tensor:
    """The centre crop of the image, (224, 224, 3) uint8: resized by Pillow, as for published accuracies."""
    return to_pixels(VAL(read_image(path)))


@register("imagenet", num_classes=NUM_CLASSES, image_size=224, model_family="imagenet", mean=MEAN, std=STD)
def read(root: Path, train: bool, skip_broken: bool = False) -> ImageFiles:
    """`root`/imagenet/train or val, with a folder <wnid> for each class."""
    home, part = root / "imagenet", "train" if train else "val"
    if not os.path.isdir(home / part):
        raise missing("ImageNet", home / part, "put its class folders n01440764, ... there")
    classes = class_list([home / "train", home / "val"], NUM_CLASSES)
    files = files_of_split(home, part, classes, IMAGES)
    return ImageFiles.of(files, train_view, val_view, MEAN, STD, skip_broken, tuple(classes))


@lru_cache
def _views(native: NativeInput) -> tuple[v2.Transform, v2.Transform]:
    """For training, of tensors, and for validation, of Pillow's images."""
    how = v2.InterpolationMode(native.interpolation)
    train = v2.Compose([v2.RandomResizedCrop(native.size, interpolation=how), v2.RandomHorizontalFlip()])
    return train, v2.Compose([v2.Resize(int(native.size / native.crop), interpolation=how), v2.CenterCrop(native.size)])


def _own_train_view(native: NativeInput, path: str) -> Tensor:
    return _views(native)[0](read_pixels(path).permute(2, 0, 1)).permute(1, 2, 0)


def _own_val_view(native: NativeInput, path: str) -> Tensor:
    return to_pixels(_views(native)[1](read_image(path)))


def at(native: NativeInput) -> DatasetInfo:
    """ImageNet as a network of another native input sees it: its size, crop, interpolation and normalisation."""
    native = replace(native, mean=tuple(native.mean), std=tuple(native.std))  # hashable
    info: DatasetInfo = dataset_dict["imagenet"]

    def own(root: Path, train: bool, skip_broken: bool = False) -> ImageFiles:
        train_view, val_view = partial(_own_train_view, native), partial(_own_val_view, native)
        files = info.read(root, train, skip_broken)
        assert isinstance(files, ImageFiles)
        return replace(files, train_view=train_view, val_view=val_view, mean=native.mean, std=native.std)

    return replace(info, image_size=native.size, mean=native.mean, std=native.std, read=own)


dataset_dict["imagenet"] = replace(dataset_dict["imagenet"], at=at)


# Names from the original code, here and below.
get_imagenet_dataloaders = partial(get_dataloaders, "imagenet")
get_imagenet_dataloaders_sample = partial(dataloaders_with_negatives, "imagenet")


def get_imagenet_train_transform(mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> transforms.Compose:
    """The augmentation of the training images, for PIL images."""
    return to_normalized(mean, std, transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip())


def get_imagenet_test_transform(mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> transforms.Compose:
    """The view of the validation images, for PIL images."""
    return to_normalized(mean, std, transforms.Resize(256), transforms.CenterCrop(224))


def get_imagenet_val_loader(val_batch_size: int, num_workers: int = 4, root: str = "./data") -> Loader:
    """The validation images alone."""
    return read(Path(expanded(root)), False).loader(val_batch_size, num_workers, train=False)
