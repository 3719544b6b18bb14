"""What a run is, recorded in its checkpoints and compared when the run is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from yacs.config import CfgNode as CN

from ..distillers import Distiller, distiller_dict, method_defaults
from ..distributed.ranks import Ranks
from ..errors import UserError
from .files.checksum import weights_digest
from .overrides import flat_settings, shown
from .run_name import is_machine_key
from .update import SumUpdate

Facts = dict[str, Any]


class Change(Enum):
    """What becomes of a run that is resumed with another value of a fact."""

    REFUSED = "the checkpoint's state belongs to the old value"
    BETWEEN_EPOCHS = "within an epoch, images would be left out or seen twice; at its end the run goes on"
    SAID = "the run goes on with the new value, and says so"


_STEPS, _PROCESSES = "the number of steps in an epoch", "the number of processes"
_TEACHER = "the digest of the teacher's weights"
_STAGES = "the stages before training"

# Every fact and every setting that is not listed may change, and the change is said. A setting that only says where a
# run is executed is not a fact of it, but for those of `_EXECUTION`.
CHANGES: dict[str, Change] = {
    "DATASET.TYPE": Change.REFUSED,
    "DATASET.VAL_FRACTION": Change.REFUSED,  # `best` is of the old validation images, and the new ones were trained on
    "DISTILLER.TYPE": Change.REFUSED,
    "DISTILLER.TEACHER": Change.REFUSED,
    "DISTILLER.STUDENT": Change.REFUSED,
    "SOLVER.TYPE": Change.REFUSED,
    "the update rule of SOLVER.TRAINER": Change.REFUSED,
    "the optimizer": Change.REFUSED,  # a class; a trainer's own `init_optimizer` returns it under any SOLVER.TYPE
    "the number of classes": Change.REFUSED,
    _TEACHER: Change.REFUSED,  # the checkpoint's would be used, whatever DISTILLER.TEACHER_CKPT says
    "the student's groups": Change.REFUSED,
    _STAGES: Change.REFUSED,
    "DATASET.TRAIN_FRACTION": Change.BETWEEN_EPOCHS,
    "EXPERIMENT.SEED": Change.BETWEEN_EPOCHS,
    "SOLVER.BATCH_SIZE": Change.BETWEEN_EPOCHS,
    "the number of training images": Change.BETWEEN_EPOCHS,
    _STEPS: Change.BETWEEN_EPOCHS,
    # A step's batch is the same over any number of processes; but the last one of an epoch may be left out.
    _PROCESSES: Change.SAID,
}
# A fact that follows from others: it is not named beside a refused one, and never without those that can be set back.
_FOLLOWS: dict[str, tuple[str, ...]] = {
    "the optimizer": ("SOLVER.TYPE", "the update rule of SOLVER.TRAINER"),
    _TEACHER: ("DATASET.TYPE", "DISTILLER.TEACHER", "the number of classes", "DISTILLER.TEACHER_CKPT"),
    _STEPS: (_PROCESSES,),
}
_EXECUTION = ("EXPERIMENT.DEVICE", "DATASET.NUM_WORKERS")


def facts_of_run(cfg: CN, distiller: Distiller, update: SumUpdate, train_loader: Any, ranks: Ranks) -> Facts:
    """The facts of a run: its settings by their keys, and what its data, networks and processes tell.

    A fact that is not known, such as the number of images of a loader without `targets`, is left out.
    """
    unused = method_defaults.keys() - distiller.config_sections(cfg)
    settings = {
        key: value
        for key, value in flat_settings(cfg).items()
        if key.partition(".")[0] not in unused and (not is_machine_key(key) or key in _EXECUTION)
    }
    if not distiller.needs_teacher:
        settings = {key: value for key, value in settings.items() if not key.startswith("DISTILLER.TEACHER")}
    known = {
        "the update rule of SOLVER.TRAINER": type(update).__name__,
        "the optimizer": type(update.optimizer).__name__,
        "the number of classes": _length(getattr(train_loader, "class_names", None)),
        # As it was built: a method may change its teacher while it trains. Half of the digest is plenty.
        _TEACHER: weights_digest(distiller.teacher)[:32] if distiller.needs_teacher else None,
        "the student's groups": getattr(distiller.student, "groups", None),
        _STAGES: ", ".join(f"{stage.name} {stage.epochs}" for stage in distiller.stages() if stage.epochs) or "none",
        "the number of training images": _length(getattr(train_loader, "targets", None)),
        _STEPS: len(train_loader),
        _PROCESSES: ranks.world,
    }
    return settings | {name: value for name, value in known.items() if value is not None}


def compare_facts(saved: Mapping[str, Any], own: Mapping[str, Any], step: int = 0) -> str:
    """What has changed since a checkpoint was saved: `SOLVER.LR 0.01 (was 0.05), ...`; "" if nothing has.

    A fact that only one of the two has is not compared: the other version of this library did not know it.

    Args:
        step: number of steps done in an epoch that is not finished.

    Raises:
        UserError: the run cannot go on with a change; names both values and the next step.
    """
    changed = {name: CHANGES.get(name, Change.SAID) for name in own if name in saved and own[name] != saved[name]}
    both = {name: f"{name} was {shown(saved[name])} and is now {shown(own[name])}" for name in changed}
    refused = _to_set_back(changed, Change.REFUSED)
    if refused:
        raise UserError(
            f"this is another run: {'; '.join(both[name] for name in refused)}; set it back, or train anew under "
            "another EXPERIMENT.NAME"
        )
    waiting = _to_set_back(changed, Change.BETWEEN_EPOCHS) if step else []
    if waiting:
        cause = " and ".join(name for name in waiting if name != _STEPS) if _PROCESSES in waiting else "it"
        raise UserError(
            f"it was saved after step {step} of an epoch whose images could not all be seen once: "
            f"{'; '.join(both[name] for name in waiting)}; set {cause} back until the epoch is done"
        )
    same = ", of the same weights" if _TEACHER in own and saved.get(_TEACHER) == own[_TEACHER] else ""
    more = {"DISTILLER.TEACHER_CKPT": same}
    return ", ".join(f"{name} {shown(own[name])} (was {shown(saved[name])}{more.get(name, '')})" for name in changed)


def check_same_run(recorded: CN, cfg: CN) -> None:
    """Refuse, by the settings alone, what `compare_facts` refuses once data and networks are there.

    Args:
        recorded: the configuration of the run that is resumed.

    Raises:
        UserError: see `compare_facts`.
    """
    saved, own = flat_settings(recorded), flat_settings(cfg)
    unused = set() if distiller_dict[cfg.DISTILLER.TYPE].needs_teacher else {"DISTILLER.TEACHER"}
    refused = [name for name, change in CHANGES.items() if change is Change.REFUSED and name not in unused]
    compare_facts(saved, {name: own[name] for name in refused if name in own})


def _to_set_back(changed: Mapping[str, Change], kind: Change) -> list[str]:
    """The changed facts of a kind with their causes: what has to be set back.

    A fact that follows from a refused one is left out. What it follows from else is named before it.
    """
    names: list[str] = []
    for name in (name for name, change in changed.items() if change is kind):
        causes = [cause for cause in _FOLLOWS.get(name, ()) if cause in changed]
        if not any(changed[cause] is Change.REFUSED for cause in causes):
            names += [*causes, name]
    return names


def _length(values: Any) -> int | None:
    """Number of `values`; None if there are none."""
    return len(values) if values is not None and len(values) else None
