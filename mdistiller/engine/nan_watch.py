"""What a run does at a loss or a gradient that is NaN or infinite: SOLVER.NAN_POLICY."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from yacs.config import CfgNode as CN

from ..console import warn
from ..distillers import Distiller
from ..distributed.ranks import Ranks
from ..errors import UserError
from ..registry import Registry
from .kept_buffers import KeptBuffers

# Steps between two readings of the losses on a GPU; each reading makes the host wait for the device.
_EVERY = 50

# SOLVER.NAN_POLICY -> its class.
nan_policy_dict = Registry("SOLVER.NAN_POLICY")


class NonFiniteLossError(UserError):
    """A loss or a gradient became NaN or infinite; names the epoch, the iteration and every loss term."""


@dataclass(frozen=True)
class Outcome:
    """What decides whether a step is sound, once all its micro-batches have gone backward.

    Attributes:
        epoch: from 1.
        step: number of the step in its epoch, from 1.
        names: of the loss terms.
        losses: (len(names),) their means over this rank's images.
        norm: () of the gradients, see `SumUpdate.unexplained`.
        index: (B,) indices of this rank's images.
    """

    epoch: int
    step: int
    names: tuple[str, ...]
    losses: Tensor
    norm: Tensor
    index: Tensor

    def values(self) -> Tensor:
        """(len(names) + 1,) the losses and the norm."""
        return torch.cat([self.losses, self.norm.reshape(1).to(self.losses)])


class NanPolicy(Protocol):
    """The interface that `Step` expects of a policy.

    Attributes:
        skipped: number of steps skipped in this epoch; None if the policy never skips.
    """

    skipped: int | None

    def begin_step(self) -> None:
        """Called at the beginning of a step."""

    def drops(self, outcome: Outcome) -> bool:
        """Whether to drop the step, on all ranks alike. Called once a step, before the update.

        Raises:
            NonFiniteLossError: the run must stop.
        """

    def check(self) -> None:
        """Check every step that has not been read yet; raises like `drops`."""

    def state_dict(self) -> dict[str, Any]:
        """The state for `load_state_dict`."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state."""


@nan_policy_dict.register("stop")
class StopAtNan:
    """Stop the run. On a GPU the values are read every 50 steps, so that the host does not wait at every step.

    Args:
        folder: where the images of a bad batch are listed, see `non_finite`.
        device: where the losses are.
    """

    skipped = None

    def __init__(self, folder: Path, distiller: Distiller, device: torch.device, ranks: Ranks, cfg: CN) -> None:
        self.folder, self.ranks = folder, ranks
        self.every = 1 if device.type == "cpu" else _EVERY
        self._pending: list[Outcome] = []

    def begin_step(self) -> None:
        pass

    def drops(self, outcome: Outcome) -> bool:
        self._pending.append(outcome)
        if len(self._pending) >= self.every:
            self.check()
        return False

    def check(self) -> None:
        pending, self._pending = self._pending, []
        if not pending or torch.cat([outcome.values() for outcome in pending]).isfinite().all():
            return
        for outcome in pending:
            values = outcome.values().tolist()
            if not all(map(math.isfinite, values)):
                raise non_finite(self.folder, outcome, values, self.ranks)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@nan_policy_dict.register("skip")
class SkipNan:
    """Skip the step without any effect, on all ranks alike, at most SOLVER.NAN_LIMIT times in a row."""

    def __init__(self, folder: Path, distiller: Distiller, device: torch.device, ranks: Ranks, cfg: CN) -> None:
        self.folder, self.ranks = folder, ranks
        self.limit = cfg.SOLVER.NAN_LIMIT
        self.skipped = self.in_a_row = 0
        self._buffers = KeptBuffers(distiller)

    def begin_step(self) -> None:
        # What a bad batch changes besides the gradients: BatchNorm's statistics.
        self._buffers.keep()

    def drops(self, outcome: Outcome) -> bool:
        values = outcome.values()
        bad = self.ranks.sum(values.isfinite().logical_not().any().to(values).reshape(1))
        # The only reading of this step: the host waits for the device here.
        *numbers, bad_ranks = torch.cat([values, bad]).tolist()
        if not bad_ranks:
            self.in_a_row = 0
            self._buffers.learn()
            return False
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row > self.limit:
            raise non_finite(self.folder, outcome, numbers, self.ranks)
        self._buffers.restore()
        if self.ranks.first:
            at, named = f"epoch {outcome.epoch}, iteration {outcome.step}", _named(outcome, numbers)
            warn(f"{at} is skipped, {named}" + _elsewhere(numbers, self.ranks))
        return True

    def check(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # The state is empty if the run was saved under the other policy.
        self.skipped, self.in_a_row = state.get("skipped", 0), state.get("in_a_row", 0)


def _named(outcome: Outcome, values: list[float]) -> str:
    """The losses, and the gradients' norm if the losses do not tell enough."""
    *losses, norm = values
    named = [f"{name} = {value}" for name, value in zip(outcome.names, losses)]
    if all(map(math.isfinite, losses)) and not math.isfinite(norm):
        named.append(f"the gradients' norm is {norm}")
    return ", ".join(named)


def _elsewhere(values: list[float], ranks: Ranks) -> str:
    """Where to look as well: the gradients are averaged over the processes, and each names its own losses only."""
    *losses, _ = values
    if ranks.world == 1 or not all(map(math.isfinite, losses)):
        return ""
    return " (this process's losses are finite; another one's may not be)"


def non_finite(folder: Path, outcome: Outcome, values: list[float], ranks: Ranks) -> NonFiniteLossError:
    """The error for a step that is not sound; writes this rank's images to `folder`/non_finite.json.

    Ranks other than the first write non_finite_rank1.json and so on.

    Args:
        values: `outcome.values()`.
    """
    note = folder / ("non_finite.json" if ranks.first else f"non_finite_rank{ranks.rank}.json")
    *losses, norm = (value if math.isfinite(value) else str(value) for value in values)
    record: Mapping[str, Any] = {
        "epoch": outcome.epoch,
        "iteration": outcome.step,
        "losses": dict(zip(outcome.names, losses)),
        "grad_norm": norm,
        "index": outcome.index.tolist(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(record) + "\n", encoding="utf-8")
        listed = f"are listed in {note}"
    except OSError as error:  # a full or read-only disk must not hide the loss
        listed = f"are not listed, for {note} cannot be written ({error.strerror})"
    found = f"{_named(outcome, values)}{_elsewhere(values, ranks)}"
    return NonFiniteLossError(
        f"epoch {outcome.epoch}, iteration {outcome.step}: {found}; the batch's images {listed}, earlier "
        "checkpoints are kept; try a lower SOLVER.LR, SOLVER.CLIP_GRAD_NORM, or SOLVER.NAN_POLICY skip"
    )
