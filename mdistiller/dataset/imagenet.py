"""ImageNet (ILSVRC 2012): class folders of images, seen at 224x224 pixels in 1,000 classes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torchvision import transforms as T

from ._base import Loader, get_dataloaders, missing, register
from .folders import ImageFiles, class_folders, labelled_files

NUM_CLASSES = 1000
TO_INPUT = (T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
TRAIN = T.Compose([T.RandomResizedCrop(224), T.RandomHorizontalFlip(), *TO_INPUT])
VAL = T.Compose([T.Resize(256), T.CenterCrop(224), *TO_INPUT])


@register("imagenet", num_classes=NUM_CLASSES, image_size=224, model_family="imagenet")
def read(root: Path, train: bool) -> ImageFiles:
    """`root`/imagenet/train or val, with a folder <wnid> for each class."""
    part = root / "imagenet" / ("train" if train else "val")
    if not part.is_dir():
        raise missing("ImageNet", part, "put its class folders n01440764, ... there")
    return ImageFiles.of(labelled_files(part, class_folders(part, NUM_CLASSES)), TRAIN, VAL)


# The original's names, here and below.
get_imagenet_dataloaders = partial(get_dataloaders, "imagenet")


def get_imagenet_val_loader(val_batch_size: int, num_workers: int = 4, root: str = "./data") -> Loader:
    """The validation images alone."""
    return read(Path(root).expanduser(), False).loader(val_batch_size, num_workers, train=False)
