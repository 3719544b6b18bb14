"""Random generators: seeding, and saving and restoring their state."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int, epoch: int = 0, rank: int = 0) -> None:
    """Seed Python's, NumPy's and torch's generators from (seed, epoch, rank).

    Called before the networks are built (epoch 0) and at the start of every epoch, so that a resumed run draws the
    same numbers as an uninterrupted one.
    """
    words = np.random.SeedSequence((seed, epoch, rank)).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of the generators that `seed_everything` seeds, in tensors and plain containers.

    Args:
        device: of the run; on a GPU, the state includes that of this GPU's generator.
    """
    numpy = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": {**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].tolist()}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore a `random_state`, which may be of another kind of device."""
    random.setstate(state["python"])
    numpy = state["numpy"]
    key = np.array(numpy["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
