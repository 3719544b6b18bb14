"""The random generators of a run, as one of the things that it resumes."""

from __future__ import annotations

from typing import Any

import torch

from ..distributed.ranks import Ranks
from .runtime.seeds import random_state, seed_everything, set_random_state


class Generators:
    """The generators that `seed_everything` seeds, in every rank of a run.

    Args:
        seed: EXPERIMENT.SEED.
        device: of the run; on a GPU, that GPU's generator belongs to them.
    """

    def __init__(self, seed: int, device: torch.device, ranks: Ranks) -> None:
        self._seed, self._device, self._ranks = seed, device, ranks

    def seed(self, epoch: int) -> None:
        """Seed them for the beginning of `epoch`."""
        seed_everything(self._seed, epoch, self._ranks.rank)

    def state_dict(self) -> dict[str, Any]:
        """The state of every rank's generators, under "random"; every rank must call this."""
        return {"random": self._ranks.gather(random_state(self._device))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore this rank's generators; they stay as they are if the state is of another number of ranks."""
        if len(state["random"]) == self._ranks.world:
            set_random_state(state["random"][self._ranks.rank], self._device)
