"""Batches depend only on seed and position: not on the number of loading processes or on where the run starts."""

import itertools
import random

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="detectron2 is not installed: make detection")

from detection.model.data import Batches, build_train_loader, seed_of, seeded
from mdistiller.errors import UserError


def test_seeded_repeats_and_restores_the_generators():
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    undisturbed = [draw(), draw()]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = draw()
    with seeded(5):
        first = draw()
    with seeded(5):
        assert draw() == first
    assert [before, draw()] == undisturbed


def test_seeds_differ():
    seeds = {seed_of(seed, place) for seed in range(30) for place in range(30)}
    assert len(seeds) == 900 and seed_of(1, 2) != seed_of(2, 1) != seed_of(2, 1, 0, 1)


def take(batches, count):
    return list(itertools.islice(batches, count))


def test_batches_are_of_one_group_and_every_image_comes_once_per_pass():
    groups = [i % 3 == 0 for i in range(12)]  # 4 upright
    batches = take(Batches(groups, 2, seed=0), 30)
    assert all(len({groups[index] for _, index in batch}) == 1 for batch in batches)
    draws = sorted(draw for batch in batches for draw in batch)
    assert [place for place, _ in draws[:48]] == list(range(48)), "no draw is lost"
    for start in range(0, 48, 12):
        assert sorted(index for _, index in draws[start : start + 12]) == list(range(12))


def test_batches_start_anywhere():
    groups = [i % 3 == 0 for i in range(10)]
    later = Batches(groups, 2, seed=3)
    later.start = 7
    assert take(later, 5) == take(Batches(groups, 2, seed=3), 12)[7:]
    assert take(Batches(groups, 2, seed=4), 12) != take(Batches(groups, 2, seed=3), 12)


def content(batch):
    return [(x["file_name"], x["image"].numpy().tobytes(), x["instances"].gt_boxes.tensor.tolist()) for x in batch]


def test_images_depend_on_neither_the_loading_processes_nor_what_was_drawn_before(small_cfg):
    sizes = ("INPUT.MIN_SIZE_TRAIN", "(48, 64, 80)")
    here, apart = (
        build_train_loader(small_cfg("DKD/DKD-R18-R101", *sizes, "DATALOADER.NUM_WORKERS", workers), seed=2)
        for workers in ("0", "2")
    )
    expected = [content(batch) for batch in take(here, 6)]
    assert [content(batch) for batch in take(apart, 6)] == expected
    here.batch_sampler.start = 4
    torch.manual_seed(99), np.random.seed(99)
    assert [content(batch) for batch in take(here, 2)] == expected[4:]
    assert len({text for batch in expected for text in batch[0][1:2]}) == 6, "another augmentation each time"


@pytest.mark.parametrize("opts", [("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler")])
def test_refused(small_cfg, opts):
    with pytest.raises(UserError, match="must be TrainingSampler, not 'RepeatFactorTrainingSampler'"):
        build_train_loader(small_cfg("DKD/DKD-R18-R101", *opts), seed=0)
