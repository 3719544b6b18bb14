"""Watching the losses for NaN and infinity without making the host wait for the device at every step."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError

# Steps between two looks at the losses on a device that must be waited for.
_EVERY = 50


class NonFiniteLossError(UserError):
    """A loss became NaN or infinite; names the epoch, the iteration and every part of the loss."""


class FiniteWatch:
    """Remembers the losses of the latest steps and looks at them now and then: on the CPU, which knows them, at once.

    Args:
        folder: where the images of a bad batch are noted, in `non_finite.json`.
        device: where the losses are.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder = folder
        self.every = 1 if device.type == "cpu" else _EVERY
        self._pending: list[tuple[int, int, list[str], Tensor, Tensor]] = []

    def add(self, epoch: int, step: int, losses: dict[str, Tensor], index: Tensor) -> None:
        """Remember a step's losses (), and the images `index` (B,) they are of.

        Raises:
            NonFiniteLossError: see `check`.
        """
        values = torch.stack([loss.detach().mean().float() for loss in losses.values()])
        self._pending.append((epoch, step, list(losses), values, index))
        if len(self._pending) >= self.every:
            self.check()

    def check(self) -> None:
        """Look at the steps since the last look.

        Raises:
            NonFiniteLossError: a loss was not finite; its batch is noted first.
        """
        pending, self._pending = self._pending, []
        if not pending or torch.cat([values for *_, values, _ in pending]).isfinite().all():
            return
        epoch, step, names, values, index = next(p for p in pending if not p[3].isfinite().all())
        raise self.error(epoch, step, dict(zip(names, values.tolist())), index)

    def error(self, epoch: int, step: int, losses: dict[str, float], index: Tensor) -> NonFiniteLossError:
        """The error of a step with a bad loss; its batch is noted in `non_finite.json`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        note = self.folder / "non_finite.json"
        parts = {name: value if math.isfinite(value) else str(value) for name, value in losses.items()}
        record = {"epoch": epoch, "iteration": step, "losses": parts, "index": index.tolist()}
        note.write_text(json.dumps(record) + "\n", encoding="utf-8")
        named = ", ".join(f"{name} = {value}" for name, value in losses.items())
        return NonFiniteLossError(
            f"epoch {epoch}, iteration {step}: {named}; the batch's images are listed in {note}, the checkpoints from "
            "before are kept; try a lower SOLVER.LR, SOLVER.CLIP_GRAD_NORM, or SOLVER.NAN_POLICY skip"
        )
