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

# Steps between two readings of the losses on a device that the host must wait for.
_EVERY = 50

# SOLVER.NAN_POLICY -> its class.
nan_policy_dict = Registry("SOLVER.NAN_POLICY")


class NonFiniteLossError(UserError):
    """A loss became NaN or infinite; names the epoch, the iteration and every loss term."""


class NanPolicy(Protocol):
    """What `Step` asks of a policy.

    Attributes:
        skipped: steps without effect in this epoch; None where no step is ever skipped.
    """

    skipped: int | None

    def begin_step(self) -> None:
        """A step begins."""

    def drops(self, epoch: int, step: int, losses: dict[str, Tensor], index: Tensor) -> bool:
        """Whether these losses () make the step one to drop.

        Args:
            step: of the epoch, from 1.
            index: (B,) the images that the losses are of.

        Raises:
            NonFiniteLossError: the run must stop.
        """

    def check(self) -> None:
        """Read every loss that was not read yet; raises like `drops`."""

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""


@nan_policy_dict.register("stop")
class StopAtNan:
    """Stop the run. On a GPU the losses are read every 50 steps, so that the host does not wait for it at each one.

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
    """Go on as if the step had not been, at most SOLVER.NAN_LIMIT times in a row; on all ranks alike."""

    def __init__(self, folder: Path, distiller: nn.Module, device: torch.device, ranks: Ranks, cfg: CN) -> None:
        self.folder, self.distiller, self.ranks = folder, distiller, ranks
        self.limit = cfg.SOLVER.NAN_LIMIT
        self.skipped = self.in_a_row = 0
        self._before: list[Tensor] = []

    def begin_step(self) -> None:
        # What a bad batch would change beside the gradients: BatchNorm's statistics, CRD's memory banks.
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
        # Empty where the run was saved under the other policy.
        self.skipped, self.in_a_row = state.get("skipped", 0), state.get("in_a_row", 0)


def non_finite(folder: Path, epoch: int, step: int, losses: dict[str, float], index: Tensor) -> NonFiniteLossError:
    """The error of a step with a bad loss; the images of its batch are listed in `folder`/non_finite.json."""
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "non_finite.json"
    terms = {name: value if math.isfinite(value) else str(value) for name, value in losses.items()}
    record = {"epoch": epoch, "iteration": step, "losses": terms, "index": index.tolist()}
    note.write_text(json.dumps(record) + "\n", encoding="utf-8")
    named = ", ".join(f"{name} = {value}" for name, value in losses.items())
    return NonFiniteLossError(
        f"epoch {epoch}, iteration {step}: {named}; the batch's images are listed in {note}, the checkpoints from "
        "before are kept; try a lower SOLVER.LR, SOLVER.CLIP_GRAD_NORM, or SOLVER.NAN_POLICY skip"
    )
