"""Training batches that depend only on the seed and on their position in the run, so that a resumed run repeats them.

When a run is resumed, detectron2's own loader restarts its shuffling, its grouping by orientation and its augmentation.
In this loader, every image drawn has a position in one endless stream, and that position seeds its augmentation.
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
from detectron2.data import (
    DatasetFromList,
    DatasetMapper,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.detection_utils import check_image_size, read_image
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from mdistiller.console import one_line
from mdistiller.errors import UserError

Draw = tuple[int, int]


def seed_of(*numbers: int) -> int:
    """Combine several numbers into one seed in [0, 2^32)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed all random generators of the CPU (Python, NumPy, torch); restore their states afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class Mapper(DatasetMapper):
    """detectron2's; for an image that is to blame it returns the UserError, which `Loader` raises.

    An exception that is raised in a loading process arrives with that process's traceback as its message.
    """

    def __call__(self, dataset_dict: dict[str, Any]) -> Any:
        try:
            return super().__call__(dataset_dict)
        except Exception:
            error = broken_image(dataset_dict, self.image_format)
            if error is None:
                raise
            return error


def broken_image(dataset_dict: dict[str, Any], image_format: str) -> UserError | None:
    """What is wrong with an image file: missing, unreadable, or of another size than its annotation says."""
    path = dataset_dict["file_name"]
    try:
        image = read_image(path, format=image_format)
    except Exception as error:  # on damaged bytes the decoders raise nearly anything
        reason = getattr(error, "strerror", None) or one_line(error) or type(error).__name__
        return UserError(f"{path} cannot be read as an image ({reason}); put an intact copy there")
    try:
        check_image_size(dict(dataset_dict), image)
    except ValueError:
        annotated, own = (dataset_dict["width"], dataset_dict["height"]), (image.shape[1], image.shape[0])
        sizes = f"{own[0]}x{own[1]} pixels, its annotation says {annotated[0]}x{annotated[1]}"
        return UserError(f"{path} has {sizes}; correct `width` and `height`, or put the annotated image there")
    return None


class Loader(DataLoader):
    """Raises the UserErrors that `Mapper` returned, in the process that trains or evaluates."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            for item in batch:
                if isinstance(item, UserError):
                    raise item
            yield batch


class Draws(Dataset):
    """Item (place, index) is image `index`, with its augmentation seeded by `place`, its position in the stream."""

    def __init__(self, images: Sequence[dict[str, Any]], mapper: Callable[[dict[str, Any]], Any], seed: int) -> None:
        self.images, self.mapper, self.seed = images, mapper, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: Draw) -> Any:
        place, index = draw
        with seeded(seed_of(self.seed, place)):
            return self.mapper(self.images[index])


class Batches(Sampler[list[Draw]]):
    """Endless batches from this process's share of the shuffled stream; all images of a batch are of one group.

    Args:
        groups: the group of each image, True for upright ones; batches of one orientation need less padding.
        size: images per batch.
        seed: of the shuffle.

    Attributes:
        start: number of batches to skip, for a run that is resumed.
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
    """A loader of lists of mapped images, `SOLVER.IMS_PER_BATCH` in total over all processes.

    To resume, set `loader.batch_sampler.start`.

    Raises:
        UserError: a sampler other than TrainingSampler; a batch size that the processes cannot share equally.
    """
    processes = comm.get_world_size()
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        raise UserError(f"DATALOADER.SAMPLER_TRAIN must be TrainingSampler, not {cfg.DATALOADER.SAMPLER_TRAIN!r}")
    if cfg.SOLVER.IMS_PER_BATCH % processes:
        value = cfg.SOLVER.IMS_PER_BATCH
        raise UserError(f"SOLVER.IMS_PER_BATCH {value} must be a multiple of {processes}, the number of processes")
    images = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
    )
    upright = [cfg.DATALOADER.ASPECT_RATIO_GROUPING and x["height"] >= x["width"] for x in images]
    return Loader(
        Draws(DatasetFromList(images, copy=False), Mapper(cfg, is_train=True), seed),
        batch_sampler=Batches(upright, cfg.SOLVER.IMS_PER_BATCH // processes, seed),
        collate_fn=list,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        generator=torch.Generator(),  # the loader draws a seed at its start; keep it off the model's generator
    )


def build_test_loader(cfg: CfgNode, name: str) -> DataLoader:
    """detectron2's loader of the images of the data set `name`, which names an image that cannot be read."""
    plain = build_detection_test_loader(cfg, name, mapper=Mapper(cfg, is_train=False))
    return Loader(
        plain.dataset,
        batch_size=plain.batch_size,
        sampler=plain.sampler,
        num_workers=plain.num_workers,
        collate_fn=plain.collate_fn,
    )
