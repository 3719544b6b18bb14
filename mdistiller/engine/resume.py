"""The state of a run: saved in its checkpoints, restored from them when the run is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from yacs.config import CfgNode as CN

from ..console import reason, warn
from ..distillers import Distiller
from ..distributed.ranks import Ranks
from ..errors import UserError
from .ema import EMA
from .epoch_state import EpochState
from .files.checkpoint import DEPLOYED, HEAD, SaveError, load_state, save_checkpoint, strip_module
from .files.run_folder import newest_whole, prune
from .nan_watch import NanPolicy, NonFiniteLossError
from .runtime.seeds import random_state, set_random_state
from .scores import Score
from .update import SumUpdate


class RunState:
    """Saves and restores a run's state, also in the middle of an epoch.

    Args:
        folder: the run's folder.
        distiller, update, ema, nan_policy: the objects whose state is saved.

    Attributes:
        best_acc, last_acc: top-1 accuracy of every head, in percent, of the best and of the last epoch.
        interrupted: the saved progress of an interrupted epoch; empty at the end of an epoch.
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
        """Record the last and the best top-1 of every head; returns the heads that reached their best."""
        self.last_acc = {name: score.top1 for name, score in scores.items()}
        improved = [name for name, top1 in self.last_acc.items() if top1 >= self.best_acc.get(name, 0.0)]
        self.best_acc |= {name: self.last_acc[name] for name in improved}
        return improved

    def save(self, epoch: int, improved: list[str]) -> None:
        """After an epoch: write the `best` files of improved heads, `epoch_N` if it is due, and `latest` last.

        A run that is killed in between resumes from the previous `latest` and writes the other files again.

        Raises:
            NonFiniteLossError, SaveError: see `_write`.
        """
        first, *others = self.last_acc
        main = self._deployment(first)
        files = {f"student_best_{name}": self._deployment(name) for name in set(others) & set(improved)}
        if first in improved:
            files |= {"student_best": main, "best": self._content(epoch)}
        if epoch % self.log.SAVE_CHECKPOINT_FREQ == 0:
            files |= {f"student_{epoch}": main, f"epoch_{epoch}": self._content(epoch)}
        if self.ema is not None:
            files["student_latest_ema"] = self._deployment("ema")
        self._write(files | {"student_latest": main, "latest": self._content(epoch)})

    def _deployment(self, head: str) -> dict[str, Any]:
        """The content of a `student_*` file: the weights of the deployment that a head scores, or of the EMA."""
        networks = self.distiller.deployments()
        name = head if head in networks else next(iter(networks))
        network = self.distiller.network_to_save(name)
        saved = self.ema.network if self.ema is not None and head == "ema" else network
        return {"model": saved.state_dict(), **self._deployed(network), **({HEAD: name} if len(networks) > 1 else {})}

    def _deployed(self, network: nn.Module) -> dict[str, str]:
        """What a checkpoint says of the network that is deployed; nothing if that is the student alone."""
        return {} if network is self.distiller.student else {DEPLOYED: type(network).__name__}

    def save_within(self, at: EpochState) -> None:
        """Within an epoch: write `latest`, so that resuming continues with the next step. Every rank must call this.

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
        """Everything that resuming needs at the end of `epoch`: the original's keys, and more."""
        content = {
            "epoch": epoch,
            "model": self.distiller.state_dict(),
            **self.update.state_dict(),
            "best_acc": next(iter(self.best_acc.values()), 0.0),
            "head_best_acc": self.best_acc,
            "head_last_acc": self.last_acc,
            **self._deployed(self.distiller.main_network()),
        }
        return content | ({"ema": self.ema.state_dict()} if self.ema is not None else {})

    def _write(self, files: Mapping[str, Any]) -> None:
        """Write the checkpoints on the first rank, in their order; the other ranks wait.

        Raises:
            NonFiniteLossError: a weight is not finite.
            SaveError: a checkpoint could not be written, and LOG.SAVE_ERROR is "stop".
        """
        norms = torch.stack(torch._foreach_norm([p.detach() for p in self.distiller.main_network().parameters()]))
        if not norms.isfinite().all():
            raise NonFiniteLossError(
                f"the student's weights are not finite; the checkpoints in {self.folder} were not overwritten; "
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
        """Restore `latest`, or else the newest intact checkpoint; returns the number of completed epochs.

        Raises:
            UserError: there is none, or it belongs to another method or network.
        """
        content, path, damaged = newest_whole(self.folder)
        for line in damaged if self.ranks.first else ():
            warn(f"{line}; resuming from {path}")
        try:
            self._restore(content, path)
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise UserError(f"{path} does not fit this run ({reason(error)})") from None
        return int(content["epoch"])

    def _restore(self, content: dict[str, Any], path: Path) -> None:
        """Restore a checkpoint's content; only what `load_resumable` checks can be relied on."""
        load_state(self.distiller, strip_module(content["model"]), path)
        try:
            self.update.load_state_dict(content)
        except (ValueError, KeyError) as error:
            raise UserError(f"{path}: its optimizer state does not fit this run ({error})") from None
        if self.ema is not None:
            if "ema" not in content:
                raise UserError(f"{path} has no EMA of the student's weights; resume it with SOLVER.EMA 0")
            load_state(self.ema.network, content["ema"]["model"], path)
            self.ema.updates = content["ema"]["updates"]
        # The original saves one number, because it has only one head.
        self.best_acc = dict(content.get("head_best_acc", {"": float(content["best_acc"])}))
        self.last_acc = dict(content.get("head_last_acc", self.best_acc))
        self.interrupted = content.get("within_epoch", {})
        self.take_up(1)  # raises if the position does not fit, before training starts
        self.interrupted = content.get("within_epoch", {})

    def take_up(self, epoch: int) -> EpochState:
        """The progress of `epoch`: at its beginning, or where it was interrupted."""
        position, self.interrupted = self.interrupted, {}
        at = EpochState(epoch)
        if position:
            at.load_state_dict(position, self.ranks, self.device)
            self.nan_policy.load_state_dict(position.get("nan_policy", {}))
            if len(position["random"]) == self.ranks.world:
                set_random_state(position["random"][self.ranks.rank])
        return at
