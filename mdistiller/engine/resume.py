"""The state of a run: saved in its checkpoints, restored from them when the run is resumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn as nn
from yacs.config import CfgNode as CN

from ..console import note, one_line, out_of_memory, reason, warn
from ..distillers import Distiller
from ..distributed.ranks import Ranks
from ..errors import UserError
from ..models.tensor_groups import all_finite
from .ema import EMA
from .epoch_state import EpochState
from .files.checkpoint import (
    CLASS_NAMES,
    DEPLOYED,
    HEAD,
    SaveError,
    check_classes,
    description_by,
    load_state,
    save_checkpoint,
    strip_module,
)  # fmt: skip
from .files.run_folder import newest_whole, prune
from .generators import Generators
from .nan_watch import NanPolicy, NonFiniteLossError
from .phases import Phases
from .resume_facts import Facts, compare_facts
from .scores import ScoreRecord
from .update import SumUpdate


class Resumable(Protocol):
    """What a run resumes: the entries of `RunState.parts` and `RunState.within`."""

    def state_dict(self) -> dict[str, Any]:
        """The state, of tensors and plain containers. Every rank must call this."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Restore a state, also one that another version wrote."""


# Keys of a checkpoint: the progress within an epoch, and the facts of the run.
_WITHIN, _FACTS = "within_epoch", "facts"
# The parts whose states lie beside each other in a checkpoint, under the original's keys and those of `within_epoch`.
# The state of any other part lies under its name.
_SPREAD = ("optimizer", "scores", "position", "generators")


class RunState:
    """Saves and restores a run's state, also in the middle of an epoch. Nothing else saves or restores any of it.

    Args:
        folder: the run's folder.
        distiller, update, ema, nan_policy: the objects whose state is saved.
        facts: see `resume_facts`.
        train_loader: what it tells of its images and classes goes into every checkpoint, see `description_by`.

    Attributes:
        parts: every object with a state of its own, by name.
        within: those whose state begins anew with each epoch, so that it is saved within an epoch only.
        scores: the accuracies of the heads.
        position: the progress of the present epoch.
        interrupted: whether the restored checkpoint was saved within an epoch that is still to be taken up.
        phases: of the run; set it where there are stages before training.
    """

    phases: Phases | None = None

    def __init__(
        self, folder: Path, distiller: Distiller, update: SumUpdate, ema: EMA | None, nan_policy: NanPolicy,
        device: torch.device, ranks: Ranks, cfg: CN, facts: Facts, train_loader: Any = None,
    ) -> None:  # fmt: skip
        self._loader = train_loader
        self.folder, self.distiller, self.ema, self.nan_policy = folder, distiller, ema, nan_policy
        self.ranks, self.log, self.facts = ranks, cfg.LOG, facts
        self.scores, self.position = ScoreRecord(), EpochState(device, ranks)
        self.generators = Generators(cfg.EXPERIMENT.SEED, device, ranks)
        self.parts: dict[str, Resumable] = {
            "model": _Weights(distiller), "optimizer": update, "scores": self.scores, "nan_policy": nan_policy,
        }  # fmt: skip
        if ema is not None:
            self.parts["ema"] = ema
        self.within: dict[str, Resumable] = {"position": self.position, "generators": self.generators}
        self.interrupted = False
        self._draws: dict[str, Any] = {}
        # Completed epochs and steps of the next one: where a save was last tried, and of the last that stands.
        self._tried: tuple[int, int] | None = None
        self._saved: tuple[int, int] | None = None

    @property
    def best_acc(self) -> dict[str, float]:
        """Top-1 accuracy of every head, in percent, of its best epoch."""
        return self.scores.best

    @property
    def last_acc(self) -> dict[str, float]:
        """Top-1 accuracy of every head, in percent, of the last epoch."""
        return self.scores.last

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
        self._write(files | {"student_latest": main, "latest": self._content(epoch)}, (epoch, 0))

    def save_stage(self, epoch: int) -> None:
        """After an epoch of a stage before training: write `latest`. Nothing is scored, so that nothing is best.

        Raises:
            NonFiniteLossError, SaveError: see `_write`.
        """
        self._write({"latest": self._content(epoch)}, (epoch, 0))

    def _deployment(self, head: str) -> dict[str, Any]:
        """The content of a `student_*` file: the weights of the deployment that a head scores, or of the EMA."""
        networks = self.distiller.deployments()
        name = head if head in networks else next(iter(networks))
        network = self.distiller.network_to_save(name)
        saved = self.ema.network if self.ema is not None and head == "ema" else network
        marks = {**self._deployed(network), **({HEAD: name} if len(networks) > 1 else {})}
        return self._described({"model": saved.state_dict(), **marks})

    def _described(self, content: dict[str, Any]) -> dict[str, Any]:
        """`content` and what the training loader tells of its images."""
        return {**content, **description_by(self._loader)}

    def _deployed(self, network: nn.Module) -> dict[str, str]:
        """What a checkpoint says of the network that is deployed; nothing if that is the student alone."""
        return {} if network is self.distiller.student else {DEPLOYED: type(network).__name__}

    def save_within(self, at: EpochState) -> None:
        """Within an epoch: write `latest`, so that resuming continues with the next step. Every rank must call this.

        Where `latest` has been written at this step, it stands; where writing failed, it is tried again.

        Raises:
            NonFiniteLossError, SaveError: see `_write`.
        """
        self.nan_policy.check()
        here = (at.epoch - 1, at.step)
        if self._saved == here:
            return  # before validation, where the last step has been saved
        self._write({"latest": self._content(at.epoch - 1) | {_WITHIN: _states(self.within)}}, here)

    def continuation(self) -> str:
        """Where the same command with --resume goes on after the last `save` or `save_within`, in words."""
        if self._saved is None:
            return "no checkpoint could be written, so there is none to resume from"
        if self._saved == self._tried:
            return "the same command with --resume goes on from here"
        return (
            "nothing could be written here: the same command with --resume resumes from the last saved checkpoint "
            f"({self.last_saved})"
        )

    @property
    def last_saved(self) -> str:
        """What the last `save` or `save_within` was after, in words; empty if none stands."""
        if self._saved is None:
            return ""
        epochs, step = self._saved
        return f"{self._words(epochs + 1)}, step {step}" if step else f"the end of {self._words(epochs)}"

    def _words(self, epoch: int) -> str:
        return f"epoch {epoch}" if self.phases is None else self.phases.words(epoch)

    def _content(self, epoch: int) -> dict[str, Any]:
        """Everything that resuming needs at the end of `epoch`: the original's keys, and more."""
        deployed = self._deployed(self.distiller.main_network())
        return self._described({"epoch": epoch, **_states(self.parts), **deployed, _FACTS: self.facts})

    def _write(self, files: Mapping[str, Any], here: tuple[int, int]) -> None:
        """Write the checkpoints on the first rank, in their order; the other ranks wait, and learn whether they stand.

        Args:
            here: completed epochs, and steps of the next one.

        Raises:
            NonFiniteLossError: a weight is not finite.
            SaveError: a checkpoint could not be written, and LOG.SAVE_ERROR is "stop".
        """
        if not all_finite([p.detach() for p in self.distiller.main_network().parameters()]):
            raise NonFiniteLossError(
                f"the student's weights are not finite; the checkpoints in {self.folder} were not overwritten; "
                "try a lower SOLVER.LR or SOLVER.CLIP_GRAD_NORM"
            )
        self._tried, failed = here, False
        if self.ranks.first:
            try:
                for name, content in files.items():
                    save_checkpoint(content, self.folder / name, keep_previous=name == "latest")
                prune(self.folder, self.log.KEEP_CHECKPOINTS)
            except SaveError as error:
                if self.log.SAVE_ERROR == "stop":
                    raise
                failed = True
                warn(f"{error}; training goes on to the next save")
        if not self.ranks.maximum(int(failed)):
            self._saved = here

    def restore(self) -> int:
        """Restore `latest`, or else the newest intact checkpoint; returns the number of completed epochs.

        Says in one line what has changed since it was saved.

        Raises:
            UserError: there is none, or it belongs to another run, method or network.
        """
        content, path, damaged = newest_whole(self.folder)
        for line in damaged if self.ranks.first else ():
            warn(f"{line}; resuming from {path}")
        changed = self._restore(content, path)
        if changed and self.ranks.first:
            note(f"resuming {self.folder} with {changed}")
        return int(content["epoch"])

    def _restore(self, content: dict[str, Any], path: Path) -> str:
        """Restore a checkpoint's content, of which only what `load_resumable` checks can be relied on.

        Returns:
            What has changed since it was saved, in words; "" if nothing has.
        """
        check_classes(content, path, description_by(self._loader).get(CLASS_NAMES))
        with _fitting(path, "recorded"):
            within = dict(content.get(_WITHIN, {}))
            changed = compare_facts(dict(content.get(_FACTS, {})), self.facts, within.get("step", 0))
            # Earlier versions kept it there.
            content = {"nan_policy": within.get("nan_policy", {})} | content
        left_out = self._take_up_phase(int(content["epoch"]) + 1, bool(within))
        for name, part in self.parts.items():
            if name in left_out:
                continue
            # `load_state` says itself which weights do not fit; a fault in a method's own code keeps its traceback.
            with _naming(path) if name == "model" else _fitting(path, name):
                _load(name, part, content)
        if self.ema is not None and "ema" not in content:
            self.ema.begin(self.distiller.main_network())
            changed = ", ".join(filter(None, [changed, "an EMA that starts at the checkpoint's weights"]))
        self.position.begin(int(content["epoch"]) + 1)
        for name, part in self.within.items() if within else ():
            with _fitting(path, name):
                _load(name, part, within)
        self.interrupted, self._draws = bool(within), within
        self._saved = self._tried = (int(content["epoch"]), self.position.step)
        return changed

    def _take_up_phase(self, epoch: int, within: bool) -> tuple[str, ...]:
        """Be in the phase of the `epoch` to go on with; returns the saved parts that belong to the one before."""
        if self.phases is None:
            return ()
        self.parts["optimizer"] = self.phases.turn_to(epoch).update
        return ("optimizer",) if not within and self.phases.begins_anew(epoch) else ()

    def take_up(self, epoch: int) -> EpochState:
        """The progress of `epoch`, at its beginning or where it was interrupted; seeds the generators for the epoch."""
        self.generators.seed(epoch if self.phases is None else self.phases.now.own(epoch))
        if self.interrupted:
            self.position.clock.go_on()
        else:
            self.position.begin(epoch)
        self.interrupted = False
        return self.position

    def take_up_draws(self) -> None:
        """Continue the random draws of an interrupted epoch; call it when the loader stands at the epoch's next batch.

        A loader may draw its order when it begins, as at the beginning of an epoch that is not interrupted.
        """
        if self._draws:
            self.generators.load_state_dict(self._draws)
        self._draws = {}


class _Weights:
    """The distiller's state, under the names that it has without DataParallel."""

    def __init__(self, distiller: Distiller) -> None:
        self._distiller = distiller

    def state_dict(self) -> dict[str, Any]:
        return self._distiller.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_state(self._distiller, strip_module(state), "its model")


def _states(parts: Mapping[str, Resumable]) -> dict[str, Any]:
    """The states of `parts` as entries of a checkpoint."""
    states: dict[str, Any] = {}
    for name, part in parts.items():
        states |= part.state_dict() if name in _SPREAD else {name: part.state_dict()}
    return states


def _load(name: str, part: Resumable, content: dict[str, Any]) -> None:
    """Restore a part from the entries of a checkpoint; one that has no entry there stays as it is."""
    if name in _SPREAD:
        part.load_state_dict(content)
    elif name in content:
        part.load_state_dict(content[name])


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file's path in front of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


@contextmanager
def _fitting(path: Path, name: str) -> Iterator[None]:
    """Turn what a checkpoint with unfit entries raises into a UserError that names the file and the part."""
    try:
        with _naming(path):
            yield
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: its {name} state does not fit this run ({one_line(error, 200)})") from None
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        raise UserError(f"{path}: its {name} state does not fit this run ({reason(error)})") from None
