"""Training batches that depend on the seed and on their place in the run alone, so that a resumed run repeats them.

detectron2's own loader starts its shuffle, its grouping by orientation and its augmentations anew when a run is
resumed. Here every image that is drawn has a place in one endless stream; its augmentation is seeded by that place.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, DatasetMapper, get_detection_dataset_dicts
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from mdistiller.errors import UserError

Draw = tuple[int, int]


def seed_of(*numbers: int) -> int:
    """A seed in [0, 2^32) made of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Every generator on the CPU starts from `seed`, and goes on afterwards as if nothing had been drawn."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would turn to the GPUs too
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class Draws(Dataset):
    """Item (place, index) is image `index` as augmented for its `place` in the stream."""

    def __init__(self, images: Sequence[dict[str, Any]], mapper: Callable[[dict[str, Any]], Any], seed: int) -> None:
        self.images, self.mapper, self.seed = images, mapper, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: Draw) -> Any:
        place, index = draw
        with seeded(seed_of(self.seed, place)):
            return self.mapper(self.images[index])


class Batches(Sampler[list[Draw]]):
    """Endless batches of this process's share of the shuffled stream, each of images of one group.

    Args:
        groups: the group of each image; upright images and others are padded less when they do not meet.
        size: images a batch.
        seed: of the shuffle.

    Attributes:
        start: batches to leave out, for a run that is resumed.
    """

    def __init__(self, groups: Sequence[bool], size: int, seed: int) -> None:
        self.groups, self.size, self.start = groups, size, 0
        self.indices = TrainingSampler(len(groups), seed=seed)

    def __iter__(self) -> Iterator[list[Draw]]:
        return itertools.islice(self._all(), self.start, None)

    def _all(self) -> Iterator[list[Draw]]:
        waiting: dict[bool, list[Draw]] = {False: [], True: []}
        for place, index in zip(itertools.count(comm.get_rank(), comm.get_world_size()), self.indices):
            batch = waiting[self.groups[index]]
            batch.append((place, index))
            if len(batch) == self.size:
                waiting[self.groups[index]] = []
                yield batch


def build_train_loader(cfg: CfgNode, seed: int) -> DataLoader:
    """Lists of mapped images, `SOLVER.IMS_PER_BATCH` over all processes; `loader.batch_sampler.start` resumes.

    Raises:
        UserError: a sampler other than TrainingSampler; images that do not divide among the processes.
    """
    processes = comm.get_world_size()
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        raise UserError(f"DATALOADER.SAMPLER_TRAIN must be TrainingSampler, not {cfg.DATALOADER.SAMPLER_TRAIN!r}")
    if cfg.SOLVER.IMS_PER_BATCH % processes:
        raise UserError(f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} does not divide among {processes} processes")
    images = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
    )
    upright = [cfg.DATALOADER.ASPECT_RATIO_GROUPING and x["height"] >= x["width"] for x in images]
    return DataLoader(
        Draws(DatasetFromList(images, copy=False), DatasetMapper(cfg, is_train=True), seed),
        batch_sampler=Batches(upright, cfg.SOLVER.IMS_PER_BATCH // processes, seed),
        collate_fn=list,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        generator=torch.Generator(),  # starting to load draws a number, which must not come from the model's
    )
