"""Images that are augmented and normalised on the device have the bits of the CPU's."""

from __future__ import annotations

import pytest
import torch

from mdistiller.dataset.augment import Augment, CropFlip, RotateFlip
from mdistiller.dataset.cifar100 import MEAN, STD
from mdistiller.dataset.in_memory import ImageArray

AUGMENTS = [CropFlip(), CropFlip(padding=2, flip=False), RotateFlip(20, 32)]


def array(augment: Augment) -> ImageArray:
    images = torch.randint(0, 256, (70, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ImageArray(images, torch.arange(70) % 7, MEAN, STD, augment)


@pytest.mark.parametrize("train", [True, False], ids=["training", "validation"])
@pytest.mark.parametrize("augment", AUGMENTS, ids=repr)
def test_batches_have_the_bits_of_the_cpu_s(augment: Augment, train: bool, device: torch.device) -> None:
    here, there = (array(augment).loader(16, 0, train, seed=3).to(where) for where in ("cpu", device))
    for epoch in (1, 2):
        here.set_epoch(epoch)
        there.set_epoch(epoch)
        batches = list(zip(here, there, strict=True))
        assert [len(batch[1]) for batch, _ in batches] == [16, 16, 16, 16, 6]
        for ours, theirs in batches:
            assert all(field.device.type == device.type for field in theirs)
            assert all(torch.equal(a, b.cpu()) for a, b in zip(ours, theirs, strict=True))
        if train and augment.variants:
            index = torch.arange(70)
            assert torch.equal(here.variant(index), there.variant(index).cpu())
