"""Networks and data so small that a whole run takes a tenth of a second; `register` gives them their names.

The networks are `small` and, since no network of the library draws random numbers while it trains, `dropout`. The data
sets are `small_images`, held in memory, and `small_files`, read from image files.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mdistiller.dataset import DatasetInfo, ImageArray, dataset_dict
from mdistiller.dataset.augment import CropFlip
from mdistiller.dataset.folders import ImageFiles
from mdistiller.dataset.image_file import read_pixels
from mdistiller.models import cifar_model_dict
from mdistiller.models.cifar.resnet import ResNet

CLASSES, SIZE = 10, 16
# Not 4: for a strided 1x1 convolution of 4 channels, torch 2.14.1 writes beyond its memory on CPUs with AVX2 alone.
WIDTHS = (8, 8, 16, 16)
# Images of a class, for training and for testing.
TRAIN, TEST = 8, 2
MEAN = STD = (0.5, 0.5, 0.5)
FILES = "small_files"


class Dropout(ResNet):
    """A network that draws random numbers while it trains."""

    def forward_trunk(self, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        feats, preacts = super().forward_trunk(image)
        return [*feats[:-1], F.dropout(feats[-1], 0.2, self.training)], preacts


def small(num_classes: int) -> ResNet:
    return ResNet(8, WIDTHS, num_classes)


def dropout(num_classes: int) -> ResNet:
    return Dropout(8, WIDTHS, num_classes)


def images(train: bool) -> tuple[Tensor, Tensor]:
    """The images (N, SIZE, SIZE, 3) uint8, noise around a colour for each class, and their labels (N,)."""
    generator = torch.Generator().manual_seed(int(train))
    targets = torch.arange(CLASSES).repeat(TRAIN if train else TEST)
    colours = torch.linspace(60, 190, CLASSES)[targets, None, None, None]
    noise = torch.randn(len(targets), SIZE, SIZE, 3, generator=generator)
    return (colours + 40 * noise).clamp(0, 255).to(torch.uint8), targets


def read_images(root: Path, train: bool, skip_broken: bool = False) -> ImageArray:
    return ImageArray(*images(train), MEAN, STD, CropFlip(padding=1))


def write_files(root: Path) -> None:
    """Write the images below `root`, and a file that is no image."""
    for train in (True, False):
        folder = root / FILES / str(train)
        folder.mkdir(parents=True)
        for number, image in enumerate(images(train)[0]):
            Image.fromarray(image.numpy()).save(folder / f"{number}.png")
    (root / FILES / "broken.png").write_bytes(b"no image")


def flipped(path: str) -> Tensor:
    image = read_pixels(path)
    return image.flip(1) if torch.rand(()) < 0.5 else image


def read_files(root: Path, train: bool, skip_broken: bool = False) -> ImageFiles:
    """With `skip_broken`, one of the training images is broken."""
    paths = [str(root / FILES / str(train) / f"{number}.png") for number in range(len(images(train)[1]))]
    if train and skip_broken:
        paths[5] = str(root / FILES / "broken.png")
    labelled = list(zip(paths, images(train)[1].tolist()))
    return ImageFiles.of(labelled, flipped, read_pixels, MEAN, STD, skip_broken)


NETWORKS = {"small": (small, None), "dropout": (dropout, None)}
DATA = {
    name: DatasetInfo(CLASSES, SIZE, "cifar", read, MEAN, STD)
    for name, read in {"small_images": read_images, FILES: read_files}.items()
}


def register() -> None:
    """Make the networks and the data known by name in this process."""
    cifar_model_dict.update(NETWORKS)
    dataset_dict.update(DATA)


def write_data(folder: Path) -> None:
    """Write what all runs share: the image files, the teacher, DCGD's groups."""
    write_files(folder)
    write_teacher(folder / "teacher")
    (folder / "groups.json").write_text("[[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]")


def write_teacher(path: Path) -> None:
    """Write an untrained `small` network."""
    torch.manual_seed(1)
    torch.save({"model": small(CLASSES).state_dict()}, path)
