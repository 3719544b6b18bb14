"""The digits: correctly enlarged, with a fixed split."""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.datasets import load_digits

from mdistiller.dataset import dataset_dict, get_dataloaders

read = dataset_dict["digits"].read


def test_the_split_is_fixed_and_stratified() -> None:
    train, test = read(Path(), True), read(Path(), False)
    # The 1,797 digits hold 178, 182, 177, 183, 181, 182, 181, 179, 174, 180 of the classes; 0.8 of each, rounded.
    assert train.targets.bincount().tolist() == [142, 146, 142, 146, 145, 146, 145, 143, 139, 144]
    assert test.targets.bincount().tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
    assert test.targets[:12].tolist() == [1, 3, 4, 5, 8, 5, 5, 0, 4, 7, 2, 6]  # pinned when the split was made


def test_no_digit_is_in_both_splits() -> None:
    parts = [read(Path(), train).images[:, :, :, 0].flatten(1) for train in (True, False)]
    rows = [{tuple(row) for row in part.tolist()} for part in parts]
    assert not rows[0] & rows[1]
    assert sum(map(len, parts)) == 1797


def test_images_are_the_digits_enlarged() -> None:
    images = torch.cat([read(Path(), train).images for train in (True, False)])
    assert images.shape == (1797, 32, 32, 3) and images.dtype == torch.uint8
    assert torch.equal(images[..., 0], images[..., 1]) and torch.equal(images[..., 0], images[..., 2])
    # The corner keeps its value (0..16 becomes 0..255), the middle of four pixels is their mean.
    small = torch.from_numpy(load_digits().images)
    assert sorted(images[:, 0, 0, 0].tolist()) == sorted((small[:, 0, 0] * 255 / 16).round().int().tolist())
    assert images.max() == 255 and images.min() == 0


def test_training_never_mirrors_a_digit() -> None:
    loader, _, count = get_dataloaders("digits", 64, 64, 0)
    assert count == 1438
    assert not loader.draw()[3].any()  # type: ignore[attr-defined]


def test_normalised_training_images_have_mean_0_and_deviation_1() -> None:
    images = torch.cat([x for x, _ in read(Path(), True).loader(512, 0, train=False)])
    assert abs(images.mean()) < 1e-3 and abs(images.std() - 1) < 1e-3
