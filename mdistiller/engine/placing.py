"""What a process of a run has of the distiller and of the loaders: on its device, and its share of the images."""

from __future__ import annotations

from typing import Any

import torch
from yacs.config import CfgNode as CN

from ..distillers import Distiller
from ..distributed.ranks import Ranks
from ..distributed.sync_batchnorm import synchronize_batchnorm


def placed(distiller: Distiller, device: torch.device, ranks: Ranks, cfg: CN) -> Distiller:
    """The distiller on the device, in the memory layout and with the BatchNorms that the configuration asks for."""
    layout = {"memory_format": torch.channels_last} if cfg.SOLVER.CHANNELS_LAST else {}
    distiller.to(device=device, **layout)  # type: ignore[call-overload]
    if cfg.SOLVER.SYNC_BN and ranks.world > 1:
        synchronize_batchnorm(distiller, device, skip=distiller.evaluated)
    return distiller


def own_share(loader: Any, device: torch.device, ranks: Ranks) -> Any:
    """This rank's share of `loader`, on the device. A custom loader may lack `to` and, in one process, `shard`."""
    if ranks.world > 1:
        loader = loader.shard(ranks.rank, ranks.world)
    return loader.to(device) if hasattr(loader, "to") else loader
