"""tools/train.py on a data set of image files, which loader workers read: DATASET.TYPE files, below DATASET.ROOT.

START_METHOD in the environment chooses how workers are started: fork or spawn. `--command eval` as the first arguments
runs another tool.
"""

import importlib
import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from torch import Tensor
from torchvision.transforms import v2

from mdistiller.dataset._base import register
from mdistiller.dataset.folders import ImageFiles, class_folders, labelled_files
from mdistiller.dataset.image_file import read_pixels

CROP = v2.RandomCrop(32, padding=4)


def train_view(path: str) -> Tensor:
    return CROP(read_pixels(path).permute(2, 0, 1)).permute(1, 2, 0)


@register("files", num_classes=10, image_size=32, model_family="cifar")
def read(root: Path, train: bool, skip_broken: bool = False) -> ImageFiles:
    folder = root / ("train" if train else "val")
    classes = class_folders(folder, 10)
    return ImageFiles.of(labelled_files(folder, classes), train_view, read_pixels, (0.5,) * 3, (0.25,) * 3)


def write_images(root: Path) -> None:
    """144 training images, which are 9 batches of 16, and 40 to validate on: noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (184, 32, 32, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        folder = root / ("train" if i < 144 else "val") / str(i % 10)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:03}.png")


if __name__ == "__main__":
    multiprocessing.set_start_method(os.environ.get("START_METHOD", "fork"))
    command = sys.argv.pop(2) if sys.argv[1:2] == ["--command"] else "train"
    if sys.argv[1:2] == ["--command"]:
        del sys.argv[1]
    importlib.import_module(f"mdistiller.commands.{command}").main()
