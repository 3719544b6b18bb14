"""What holds for every data set: the registry, the fixed fractions, and `get_dataset`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from yacs.config import CfgNode as CN

from mdistiller.dataset import dataset_info, get_dataset, get_val_loader, stratified_split
from mdistiller.dataset._base import mix_seed
from mdistiller.engine.cfg import load_cfg
from mdistiller.errors import UserError


def config(**dataset: object) -> CN:
    cfg = CN({"DATASET": CN({"TYPE": "digits", "ROOT": "./data", "NUM_WORKERS": 0, "TEST": CN({"BATCH_SIZE": 100})})})
    cfg.DATASET.update({"TRAIN_FRACTION": 1.0, "VAL_FRACTION": 0.0, "SKIP_BROKEN": False, **dataset})
    cfg.SOLVER = CN({"BATCH_SIZE": 64})
    cfg.EXPERIMENT = CN({"SEED": 0})
    return cfg


def test_get_dataset() -> None:
    train_loader, val_loader, num_data, num_classes = get_dataset(config())
    assert (num_data, num_classes) == (1438, 10)
    assert (train_loader.batch_size, val_loader.batch_size) == (64, 100)
    assert (len(train_loader), len(val_loader)) == (23, 4)
    assert len(next(iter(train_loader))) == 3 and len(next(iter(val_loader))) == 2


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("digits", (10, 32, "cifar")),
        ("cifar100", (100, 32, "cifar")),
        ("tiny_imagenet", (200, 64, "tiny_imagenet")),
        ("imagenet", (1000, 224, "imagenet")),
    ],
)
def test_dataset_info(name: str, facts: tuple[int, int, str]) -> None:
    info = dataset_info[name]
    assert (info.num_classes, info.image_size, info.model_family) == facts


def test_an_unknown_name_lists_similar_ones() -> None:
    with pytest.raises(UserError, match="unknown data set 'cifar10'; did you mean cifar100"):
        get_dataset(config(TYPE="cifar10"))


def test_train_fraction_is_the_same_for_every_seed() -> None:
    cfg = config(TRAIN_FRACTION=0.25)
    first, _, num_data, _ = get_dataset(cfg)
    cfg.EXPERIMENT.SEED = 5
    second, *_ = get_dataset(cfg)
    # A quarter of 142, 146, 142, 146, 145, 146, 145, 143, 139, 144, rounded to even.
    assert first.targets.bincount().tolist() == [36, 36, 36, 36, 36, 36, 36, 36, 35, 36]
    assert num_data == len(first.targets) == 359
    images = [torch.cat([x for x, _ in get_val_images(loader)]) for loader in (first, second)]
    assert torch.equal(*images)


def get_val_images(loader):  # the loader's images in order, without augmentation
    loader.train = False
    return list(loader)


def test_val_fraction_holds_out_training_images() -> None:
    train_loader, val_loader, num_data, _ = get_dataset(config(VAL_FRACTION=0.1))
    assert num_data + len(val_loader.targets) == 1438
    assert val_loader.targets.bincount().tolist() == [14, 15, 14, 15, 15, 15, 15, 14, 14, 14]
    held_out = {tuple(x.flatten().tolist()) for batch in val_loader for x in batch[0]}
    kept = {tuple(x.flatten().tolist()) for batch in get_val_images(train_loader) for x in batch[0]}
    every = {tuple(x.flatten().tolist()) for batch in get_val_loader("digits", train=True) for x in batch[0]}
    assert not held_out & kept and held_out | kept == every


def test_a_fraction_that_holds_out_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"VAL_FRACTION 0\.001 holds out no image of digits"):
        get_dataset(config(VAL_FRACTION=0.001))


def test_stratified_split_by_classes() -> None:
    targets = torch.tensor([2, 0, 2, 0, 2, 0, 2, 0, 3])  # class 1 is empty, class 3 has one
    chosen, rest = stratified_split(targets, 0.5)
    assert targets[chosen].bincount().tolist() == [2, 0, 2, 1]
    assert sorted([*chosen.tolist(), *rest.tolist()]) == list(range(9))
    assert chosen.tolist() == sorted(chosen.tolist()) and rest.tolist() == sorted(rest.tolist())


def test_a_smaller_fraction_is_a_subset_of_a_larger_one() -> None:
    targets = torch.arange(1000) % 7
    quarter, half = (set(stratified_split(targets, f)[0].tolist()) for f in (0.25, 0.5))
    assert quarter < half


def test_a_fraction_is_chosen_at_random_not_by_position() -> None:
    chosen, _ = stratified_split(torch.zeros(10000, dtype=torch.long), 0.5)
    # 5,000 indices of 0..9999 have the mean 4999.5 with a standard deviation of 29.
    assert abs(chosen.double().mean() - 4999.5) < 120


def test_seeds_of_neighbouring_keys_differ() -> None:
    seeds = {mix_seed(seed, epoch, index + 1) for seed in range(10) for epoch in range(10) for index in range(10)}
    seeds |= {mix_seed(seed, epoch) for seed in range(10) for epoch in range(10)}
    assert len(seeds) == 1100


@pytest.mark.parametrize("train", [False, True])
def test_scoring_goes_over_the_images_in_order_and_not_augmented(train: bool) -> None:
    """Two passes give the same images, those of the data set; training images move and are drawn in another order."""
    loader = get_val_loader("digits", batch_size=50, num_workers=0, train=train)
    one, two = (torch.cat([batch[0] for batch in loader]) for _ in range(2))
    targets = torch.cat([batch[1] for batch in loader])
    assert torch.equal(one, two) and torch.equal(targets, dataset_info["digits"].read(Path(), train).targets)


def test_a_loader_knows_the_image_size_before_it_reads_a_batch(tmp_path: Path) -> None:
    """So the checkpoints of a run that is resumed at an epoch's end tell it too."""
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (80, 80)).save(tmp_path / part / name / "image.png")
    cfg = load_cfg("configs/folder/vanilla.yaml", ["DATASET.ROOT", str(tmp_path), "DATASET.IMAGE_SIZE", "72"])
    train_loader, val_loader, *_ = get_dataset(cfg)
    assert (train_loader.image_size, val_loader.image_size) == (72, 72)
