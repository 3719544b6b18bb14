"""What a process of a run has of the distiller and of the loaders: on its device, and its share of the images."""

from __future__ import annotations

from typing import Any

import torch
from yacs.config import CfgNode as CN

from ..distillers import Distiller
from ..distributed.ranks import Ranks
from ..distributed.sync_batchnorm import synchronize_batchnorm
from ..errors import UserError


def placed(distiller: Distiller, device: torch.device, ranks: Ranks, cfg: CN) -> Distiller:
    """The distiller on the device, in the memory layout and with the BatchNorms that the configuration asks for."""
    layout = {"memory_format": torch.channels_last} if cfg.SOLVER.CHANNELS_LAST else {}
    distiller.to(device=device, **layout)  # type: ignore[call-overload]
    if cfg.SOLVER.SYNC_BN and ranks.world > 1:
        synchronize_batchnorm(distiller, device, skip=distiller.evaluated)
    return distiller


def counted(loader: Any) -> Any:
    """The training loader, whose steps can be counted.

    Raises:
        UserError: it has no len().
    """
    try:
        len(loader)
    except TypeError as error:
        raise UserError(
            f"the training loader, a {type(loader).__name__}, has no len() ({error}); give it __len__, the number of "
            "batches in an epoch, which schedule and progress count by"
        ) from None
    return loader


def own_share(loader: Any, device: torch.device, ranks: Ranks) -> Any:
    """This rank's share of `loader`, on the device. A custom loader may lack `to` and, in one process, `shard`.

    Raises:
        UserError: it cannot be iterated over, or there are several processes, and it has no `shard`.
    """
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise UserError(f"a loader is a {type(loader).__name__}; give the trainer loaders, which yield batches")
    if ranks.world > 1:
        if not hasattr(loader, "shard"):
            raise UserError(
                f"{ranks.world} processes cannot share the batches of a {type(loader).__name__}, which has no "
                "shard(rank, world); give it one that returns a loader of this process's images, in training an equal "
                "slice of every batch, or start one process"
            )
        loader = loader.shard(ranks.rank, ranks.world)
    return loader.to(device) if hasattr(loader, "to") else loader
