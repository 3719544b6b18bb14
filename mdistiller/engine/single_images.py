"""Batches of a single image, on which a network whose BatchNorm sees 1x1 maps cannot train."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from yacs.config import CfgNode as CN

from ..dataset.batch import VIEWS
from ..distillers import Distiller
from ..distillers.facts import image_size_of
from ..distributed.ranks import Ranks
from ..errors import UserError
from .batches import BatchReader

# How torch's BatchNorm refuses one image with a 1x1 map.
_ONE_VALUE = "Expected more than 1 value per channel when training"


def is_of_one_value(error: Exception) -> bool:
    """Whether a BatchNorm has refused a single image."""
    return _ONE_VALUE in str(error)


def cannot_train(distiller: Distiller) -> str:
    """Why single images are of no use to a method, as words that follow "a single image,"."""
    return f"on which {type(distiller).__name__} cannot train, because a BatchNorm of its networks sees 1x1 maps"


def check_single_images(distiller: Distiller, reader: BatchReader, cfg: CN, ranks: Ranks) -> None:
    """Refuse a run whose full batches give single images, if its networks cannot train on one.

    It is tried on a copy, with random generators that are put back.

    Args:
        distiller: on its device.
        reader: adds the fields of the trial's batch. Whatever else fails in the trial shows in the run's first step.

    Raises:
        UserError: a BatchNorm sees 1x1 maps.
    """
    if cfg.SOLVER.BATCH_SIZE // ranks.world > cfg.SOLVER.ACCUMULATE:
        return
    device = next(distiller.parameters()).device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            copy.deepcopy(distiller).train().forward_train(**_one_image(reader, cfg), epoch=1)
    except Exception as error:
        if is_of_one_value(error):
            raise too_few_images(distiller, cfg, ranks.world) from None


def _one_image(reader: BatchReader, cfg: CN) -> dict[str, Tensor]:
    """A batch of one image, black, and of the views of it that the method needs."""
    size, zero = image_size_of(cfg), torch.zeros(1, dtype=torch.int64)
    views = ("image", *(name for name in VIEWS if name in reader.needs))
    images = dict.fromkeys(views, torch.zeros(1, 3, size, size))
    return reader({**images, "target": zero, "index": zero}, epoch=1)


def too_few_images(distiller: Distiller, cfg: CN, world: int) -> UserError:
    """The error where every batch, or micro-batch, is a single image."""
    size, parts = cfg.SOLVER.BATCH_SIZE, cfg.SOLVER.ACCUMULATE
    by = (f" over {world} processes" if world > 1 else "") + (f" in {parts} micro-batches" if parts > 1 else "")
    remedy = f"set SOLVER.BATCH_SIZE {world * max(2, parts + (parts > 1))} or more"
    if parts > 1 and size > world:
        remedy += ", or SOLVER.ACCUMULATE 1"
    return UserError(f"SOLVER.BATCH_SIZE {size}{by} gives single images, {cannot_train(distiller)}; {remedy}")
