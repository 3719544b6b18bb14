"""What resuming needs of a run: kept in its checkpoints, restored from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode as CN

from ..console import reason, warn
from ..distillers import Distiller
from ..distributed.ranks import Ranks
from ..errors import UserError
from .ema import EMA
from .epoch_state import EpochState
from .files.checkpoint import SaveError, load_state, save_checkpoint, strip_module
from .files.run_folder import newest_whole, prune
from .nan_watch import NanPolicy, NonFiniteLossError
from .runtime.seeds import random_state, set_random_state
from .scores import Score
from .update import SumUpdate


class RunState:
    """Saves a run's state, restores it, and takes up the epoch that was interrupted.

    Args:
        folder: of the run.
        distiller, update, ema, nan_policy: whose state it is.

    Attributes:
        best_acc, last_acc: top-1 of every head, in percent: the best epoch's and the last one's.
        interrupted: where an interrupted epoch stood; empty at an epoch's end.
    """

    def __init__(
        self, folder: Path, distiller: Distiller, update: SumUpdate, ema: EMA | None, nan_policy: NanPolicy,
        device: torch.device, ranks: Ranks, cfg: CN,
    ) -> None:  # fmt: skip
        self.folder, self.distiller, self.update, self.ema = folder, distiller, update, ema
        self.nan_policy, self.device, self.ranks, self.log = nan_policy, device, ranks, cfg.LOG
        self.best_acc: dict[str, float] = {}
        self.last_acc: dict[str, float] = {}
        self.interrupted: dict[str, Any] = {}

    def note_scores(self, scores: Mapping[str, Score]) -> list[str]:
        """Keep the last and the best top-1 of every head; returns the heads whose best this is."""
        self.last_acc = {name: score.top1 for name, score in scores.items()}
        improved = [name for name, top1 in self.last_acc.items() if top1 >= self.best_acc.get(name, 0.0)]
        self.best_acc |= {name: self.last_acc[name] for name in improved}
        return improved

    def save(self, epoch: int, improved: list[str]) -> None:
        """After an epoch: write `best` where a head got better, `epoch_N` where it is due, and `latest` last.

        A run that is killed in between resumes from the `latest` before, and writes the others again.

        Raises:
            NonFiniteLossError, SaveError: see `_write`.
        """
        first, *others = self.last_acc
        student = {"model": self.distiller.student.state_dict()}
        averaged = {"model": self.ema.network.state_dict()} if self.ema is not None else {}
        files = {
            f"student_best_{name}": averaged if name == "ema" and averaged else student
            for name in set(others) & set(improved)
        }
        if first in improved:
            files |= {"student_best": student, "best": self._content(epoch)}
        if epoch % self.log.SAVE_CHECKPOINT_FREQ == 0:
            files |= {f"student_{epoch}": student, f"epoch_{epoch}": self._content(epoch)}
        if averaged:
            files["student_latest_ema"] = averaged
        self._write(files | {"student_latest": student, "latest": self._content(epoch)})

    def save_within(self, at: EpochState) -> None:
        """Within an epoch: write `latest`, so that resuming goes on with the next step. Every rank must call it.

        Raises:
            NonFiniteLossError, SaveError: see `_write`.
        """
        self.nan_policy.check()
        position = {
            **at.state_dict(self.ranks),
            "random": self.ranks.gather(random_state()),
            "nan_policy": self.nan_policy.state_dict(),
        }
        self._write({"latest": self._content(at.epoch - 1) | {"within_epoch": position}})

    def _content(self, epoch: int) -> dict[str, Any]:
        """All that resuming needs at the end of `epoch`; the original's keys, and more."""
        content = {
            "epoch": epoch,
            "model": self.distiller.state_dict(),
            **self.update.state_dict(),
            "best_acc": next(iter(self.best_acc.values()), 0.0),
            "head_best_acc": self.best_acc,
            "head_last_acc": self.last_acc,
        }
        return content | ({"ema": self.ema.state_dict()} if self.ema is not None else {})

    def _write(self, files: Mapping[str, Any]) -> None:
        """Write checkpoints, in order, from the first rank; the others wait.

        Raises:
            NonFiniteLossError: a weight is not finite.
            SaveError: one could not be written, and LOG.SAVE_ERROR says stop.
        """
        norms = torch.stack(torch._foreach_norm([p.detach() for p in self.distiller.student.parameters()]))
        if not norms.isfinite().all():
            raise NonFiniteLossError(
                f"the student's weights are not finite; nothing was written over the checkpoints in {self.folder}; "
                "try a lower SOLVER.LR or SOLVER.CLIP_GRAD_NORM"
            )
        if self.ranks.first:
            try:
                for name, content in files.items():
                    save_checkpoint(content, self.folder / name, keep_previous=name == "latest")
                prune(self.folder, self.log.KEEP_CHECKPOINTS)
            except SaveError as error:
                if self.log.SAVE_ERROR == "stop":
                    raise
                warn(f"{error}; training goes on to the next save")
        self.ranks.wait()

    def restore(self) -> int:
        """Restore the state of `latest`, or of the newest whole checkpoint; returns the number of whole epochs in it.

        Raises:
            UserError: there is none, or it belongs to another method or network.
        """
        content, path, damaged = newest_whole(self.folder)
        for line in damaged if self.ranks.first else ():
            warn(f"{line}; going on from {path}")
        try:
            self._restore(content, path)
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise UserError(f"{path} does not fit this run ({reason(error)})") from None
        return int(content["epoch"])

    def _restore(self, content: dict[str, Any], path: Path) -> None:
        """Restore a checkpoint's content; nothing is known of it beyond what `load_resumable` checks."""
        load_state(self.distiller, strip_module(content["model"]), path)
        try:
            self.update.load_state_dict(content)
        except (ValueError, KeyError) as error:
            raise UserError(f"{path}: its optimizer state does not fit this run ({error})") from None
        if self.ema is not None:
            if "ema" not in content:
                raise UserError(f"{path} has no moving average of the student's weights; resume it with SOLVER.EMA 0")
            load_state(self.ema.network, content["ema"]["model"], path)
            self.ema.updates = content["ema"]["updates"]
        # The original keeps one number, for the one head that it knows.
        self.best_acc = dict(content.get("head_best_acc", {"": float(content["best_acc"])}))
        self.last_acc = dict(content.get("head_last_acc", self.best_acc))
        self.interrupted = content.get("within_epoch", {})
        self.take_up(1)  # refuses a position that does not fit, before anything starts
        self.interrupted = content.get("within_epoch", {})

    def take_up(self, epoch: int) -> EpochState:
        """The state of the epoch that begins, or of the one that was interrupted."""
        position, self.interrupted = self.interrupted, {}
        at = EpochState(epoch)
        if position:
            at.load_state_dict(position, self.ranks, self.device)
            self.nan_policy.load_state_dict(position.get("nan_policy", {}))
            if len(position["random"]) == self.ranks.world:
                set_random_state(position["random"][self.ranks.rank])
        return at
