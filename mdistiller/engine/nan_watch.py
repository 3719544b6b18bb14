"""What a run does at a loss that is NaN or infinite: SOLVER.NAN_POLICY."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn as nn
from torch import Tensor
from yacs.config import CfgNode as CN

from ..console import warn
from ..distributed.ranks import Ranks
from ..errors import UserError
from ..registry import Registry

# Steps between two readings of the losses on a GPU; each reading makes the host wait for the device.
_EVERY = 50

# SOLVER.NAN_POLICY -> its class.
nan_policy_dict = Registry("SOLVER.NAN_POLICY")


class NonFiniteLossError(UserError):
    """A loss became NaN or infinite; names the epoch, the iteration and every loss term."""


class NanPolicy(Protocol):
    """The interface that `Step` expects of a policy.

    Attributes:
        skipped: number of steps skipped in this epoch; None if the policy never skips.
    """

    skipped: int | None

    def begin_step(self) -> None:
        """Called at the beginning of a step."""

    def drops(self, epoch: int, step: int, losses: dict[str, Tensor], index: Tensor) -> bool:
        """Whether to drop the step because of its losses ().

        Args:
            step: number of the step in its epoch, from 1.
            index: (B,) indices of the images of the batch.

        Raises:
            NonFiniteLossError: the run must stop.
        """

    def check(self) -> None:
        """Check every loss that has not been read yet; raises like `drops`."""

    def state_dict(self) -> dict[str, Any]:
        """The state for `load_state_dict`."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state."""


@nan_policy_dict.register("stop")
class StopAtNan:
    """Stop the run. On a GPU the losses are read every 50 steps, so that the host does not wait at every step.

    Args:
        folder: where the images of a bad batch are listed, in `non_finite.json`.
        device: where the losses are.
    """

    skipped = None

    def __init__(self, folder: Path, distiller: nn.Module, device: torch.device, ranks: Ranks, cfg: CN) -> None:
        self.folder = folder
        self.every = 1 if device.type == "cpu" else _EVERY
        self._pending: list[tuple[int, int, list[str], Tensor, Tensor]] = []

    def begin_step(self) -> None:
        pass

    def drops(self, epoch: int, step: int, losses: dict[str, Tensor], index: Tensor) -> bool:
        values = torch.stack([loss.detach().mean().float() for loss in losses.values()])
        self._pending.append((epoch, step, list(losses), values, index))
        if len(self._pending) >= self.every:
            self.check()
        return False

    def check(self) -> None:
        pending, self._pending = self._pending, []
        if not pending or torch.cat([values for *_, values, _ in pending]).isfinite().all():
            return
        epoch, step, names, values, index = next(p for p in pending if not p[3].isfinite().all())
        raise non_finite(self.folder, epoch, step, dict(zip(names, values.tolist())), index)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@nan_policy_dict.register("skip")
class SkipNan:
    """Skip the step without any effect, on all ranks alike, at most SOLVER.NAN_LIMIT times in a row."""

    def __init__(self, folder: Path, distiller: nn.Module, device: torch.device, ranks: Ranks, cfg: CN) -> None:
        self.folder, self.distiller, self.ranks = folder, distiller, ranks
        self.limit = cfg.SOLVER.NAN_LIMIT
        self.skipped = self.in_a_row = 0
        self._before: list[Tensor] = []

    def begin_step(self) -> None:
        # What a bad batch changes in addition to the gradients: BatchNorm's statistics, CRD's memory banks.
        self._before = [buffer.clone() for buffer in self.distiller.buffers()]

    def drops(self, epoch: int, step: int, losses: dict[str, Tensor], index: Tensor) -> bool:
        values = {name: float(loss.detach().mean()) for name, loss in losses.items()}
        if not self.ranks.maximum(not all(map(math.isfinite, values.values()))):
            self.in_a_row = 0
            return False
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row > self.limit:
            raise non_finite(self.folder, epoch, step, values, index)
        for buffer, before in zip(self.distiller.buffers(), self._before):
            buffer.copy_(before)
        if self.ranks.first:
            warn(f"epoch {epoch}, iteration {step} is skipped, its losses are {values}")
        return True

    def check(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # The state is empty if the run was saved under the other policy.
        self.skipped, self.in_a_row = state.get("skipped", 0), state.get("in_a_row", 0)


def non_finite(folder: Path, epoch: int, step: int, losses: dict[str, float], index: Tensor) -> NonFiniteLossError:
    """The error for a loss that is not finite; writes the images of its batch to `folder`/non_finite.json."""
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "non_finite.json"
    terms = {name: value if math.isfinite(value) else str(value) for name, value in losses.items()}
    record = {"epoch": epoch, "iteration": step, "losses": terms, "index": index.tolist()}
    note.write_text(json.dumps(record) + "\n", encoding="utf-8")
    named = ", ".join(f"{name} = {value}" for name, value in losses.items())
    return NonFiniteLossError(
        f"epoch {epoch}, iteration {step}: {named}; the batch's images are listed in {note}, earlier checkpoints "
        "are kept; try a lower SOLVER.LR, SOLVER.CLIP_GRAD_NORM, or SOLVER.NAN_POLICY skip"
    )
