"""scikit-learn's 1,797 real handwritten digits, enlarged from 8x8 to 3x32x32: nothing to download."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from ._base import register, stratified_split
from .augment import CropFlip
from .in_memory import ImageArray

MEAN = (0.3050,) * 3
STD = (0.3234,) * 3


@register("digits", num_classes=10, image_size=32, model_family="cifar", mean=MEAN, std=STD)
def read(root: Path, train: bool, skip_broken: bool = False) -> ImageArray:
    """Four fifths of every digit for training, the rest for testing; always the same. Nothing is read from `root`."""
    from sklearn.datasets import load_digits  # takes a second, and no other data set needs it

    digits = load_digits()
    small = torch.from_numpy(digits.images)[:, None]  # (N, 1, 8, 8) float64, 0..16
    large = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    images = (large * (255 / 16)).round().to(torch.uint8).permute(0, 2, 3, 1).repeat(1, 1, 1, 3)
    # No flip: a mirrored 2 is not a digit.
    targets = torch.from_numpy(digits.target).long()
    data = ImageArray(images, targets, MEAN, STD, CropFlip(flip=False), tuple("0123456789"))
    return data.select(stratified_split(data.targets, 0.8)[0 if train else 1])
