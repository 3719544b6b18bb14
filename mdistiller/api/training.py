"""`distill`: the trainer of the library on a caller's networks and loaders."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from yacs.config import CfgNode as CN

from ..console import PROGRESS
from ..dataset import OWN_LOADER
from ..distillers import RunFacts, distiller_dict
from ..distillers.contract import check_scores
from ..distributed.ranks import current_ranks, of_environment
from ..engine.cfg import cfg_of
from ..engine.files.checkpoint import found_weights, load_model_weights
from ..engine.modes import check_modes
from ..engine.runtime.device import pick_device
from ..engine.runtime.seeds import seed_everything
from ..engine.runtime.signals import Stopped
from ..engine.trainer import BaseTrainer, trainer_dict
from ..errors import UserError
from ..experiments.runs import read_epochs
from ..models.copies import copy_without_hooks
from ..paths import expanded
from .loaders import INDEX, batch_size_of, count_of, first_batch, image_size_of, prepared, telling
from .networks import (
    Given,
    check_given,
    classes_of,
    kept_generators,
    kept_hooks,
    kept_teacher,
    method_of,
    name_of,
    released,
)
from .result import Result
from .settings import method_name, settings_given, tree_of

# What differs from the defaults of a run from the command line.
_DEFAULTS = {"SOLVER.EPOCHS": 30, "LOG.WANDB": False}


def distill(
    student: nn.Module | str,
    teacher: nn.Module | str | None,
    train_loader: Any,
    val_loader: Any,
    method: str = "KD",
    *,
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    verbose: bool = True,
    **settings: Any,
) -> Result:
    """Train `student` with the help of `teacher`, by any of the methods, on loaders of one's own.

    The same trainer runs as for `mdistiller train`. On a GPU if there is one (`device="cpu"`: not).

    Args:
        student: a torch.nn.Module, images (B, 3, H, W) -> logits (B, C), or (logits, features by name). It is trained
            in place. Or the name of a network, such as "resnet20", "timm/resnet18" or "net.py:build".
        teacher: likewise; frozen while it teaches, and put back into its mode afterwards. None for the method "NONE",
            which trains the student alone. One that is named has the weights that its source publishes.
        train_loader, val_loader: yield (image, target), dictionaries with these keys, or (image, target, index): image
            (B, 3, H, W) float32, normalised; target (B,) integers, 0 to C - 1. A torch DataLoader, a loader of this
            library, or anything that can be iterated over once an epoch and has len(). A method that needs each
            image's index gets it added to a DataLoader's batches.
        method: "KD", "DKD", "ReviewKD", ...; `mdistiller.list_methods()` names them. Case does not matter.
        output: the folder of the run's files: checkpoints, metrics.csv, TensorBoard, config.yaml. None: a temporary
            one, which is removed at the end.
        resume: go on with the run in `output`.
        overwrite: replace the run in `output`.
        verbose: print a line for each epoch.
        settings: the settings of `mdistiller train` by the last part of their name in lower case: `epochs=30`,
            `lr=0.05`, `amp="bf16"`, `ema=0.999`, `seed=1`, `optimizer="AdamW"`, and those of the method:
            `temperature=4`. Or with their sections: `DKD={"T": 4}`, `settings={"SOLVER.EMA": 0.999}`. Their defaults
            are those of `mdistiller train`, but for 30 epochs, a cosine schedule (unless `lr_decay_stages` are given)
            and no wandb. `mean`, `std`: by which the images are normalised, per channel, for methods that ask.
            `num_classes`, `image_size` are read from the student and the first batch.

    Returns:
        The student with the weights of its best epoch, and the metrics of every epoch.

    Raises:
        UserError: something does not fit; its message is one line that says what to change.
        KeyboardInterrupt: Ctrl-C. With `output`, the run can be resumed from that step; the student keeps its weights.

    Example:
        >>> import torch, mdistiller
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> student = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 5))
        >>> teacher = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(288, 5))
        >>> data = TensorDataset(torch.randn(32, 3, 8, 8), torch.arange(32) % 5)  # images and labels of 5 classes
        >>> train, val = DataLoader(data, batch_size=8, shuffle=True), DataLoader(data, batch_size=16)
        >>> result = mdistiller.distill(student, teacher, train, val, method="DKD", epochs=2, lr=0.01, verbose=False)
        >>> 0 <= result.accuracy <= 100, len(result.history)
        (True, 2)
    """
    for network, role in ((student, "student"), (teacher, "teacher")):
        check_given(network, role)
    _check_one_process()
    name = method_name(method)
    given = {"DISTILLER.TYPE": name, **settings_given(name, settings)}
    device = pick_device(_configured(given).EXPERIMENT.DEVICE)  # wrong values are refused before any image is read
    with (
        _folder(output, name, resume) as folder, kept_hooks(student, teacher), kept_teacher(teacher), _said(verbose),
        kept_generators(device),
    ):  # fmt: skip
        batch = first_batch(train_loader)
        cfg = _with_facts(given, batch, student, teacher, train_loader, folder)
        trainer = _trainer(student, teacher, train_loader, val_loader, cfg, batch, folder.name)
        trainer.overwrite = overwrite
        _train(trainer, resume, verbose)
        return _result(trainer, student, folder if output is not None else None)


def _check_one_process() -> None:
    world = max(current_ranks().world, of_environment("WORLD_SIZE", 1, least=1))
    if world > 1:
        raise UserError(
            f"mdistiller.distill trains in one process, and {world} were started (WORLD_SIZE); start one, or train on "
            "several devices by `torchrun -m mdistiller train`"
        )


@contextmanager
def _folder(output: str | Path | None, method: str, resume: bool) -> Iterator[Path]:
    """The run's folder; a temporary one is removed at the end."""
    if output is not None:
        yield Path(os.path.abspath(expanded(str(output))))
        return
    if resume:
        raise UserError("resume=True goes on with the run in a folder; name it, such as output='runs/dkd'")
    with tempfile.TemporaryDirectory(prefix="mdistiller-", ignore_cleanup_errors=True) as temporary:
        yield Path(temporary) / method.lower()


@contextmanager
def _said(verbose: bool) -> Iterator[None]:
    """Unless `verbose`, the progress of the run is not logged."""
    before = PROGRESS.level
    if not verbose:
        PROGRESS.setLevel(logging.WARNING)
    try:
        yield
    finally:
        PROGRESS.setLevel(before)


def _with_facts(
    given: Mapping[str, Any], batch: Mapping[str, Any], student: Given, teacher: Given, loader: Any, folder: Path
) -> CN:
    """The run's configuration: what the caller has `given`, and what networks and loader tell."""
    own, size = _configured(given), image_size_of(batch)
    if own.DATASET.IMAGE_SIZE not in (0, size):
        raise UserError(f"image_size is {own.DATASET.IMAGE_SIZE}, but the images are {size}x{size}; leave it out")
    classes = own.DATASET.NUM_CLASSES or classes_of(student, batch["image"], "student")
    classes = classes or classes_of(teacher, batch["image"], "teacher") or len(_names(loader))
    if not classes:
        raise UserError("how many classes are there? A network that is named does not say; give num_classes=C")
    return _configured({
        **given, "DISTILLER.STUDENT": name_of(student), "DISTILLER.TEACHER": name_of(teacher),
        "DATASET.TYPE": OWN_LOADER, "DATASET.NUM_CLASSES": classes, "DATASET.IMAGE_SIZE": size,
        "DATASET.MEAN": _stated(own.DATASET.MEAN, loader, "mean"),
        "DATASET.STD": _stated(own.DATASET.STD, loader, "std"),
        "SOLVER.BATCH_SIZE": batch_size_of(loader, batch),
        "LOG.PREFIX": str(folder.parent), "EXPERIMENT.NAME": folder.name,
    })  # fmt: skip


def _names(loader: Any) -> tuple[str, ...]:
    """The names of the classes that a loader or its data set tells, however many."""
    for owner, attribute in ((loader, "class_names"), (getattr(loader, "dataset", None), "classes")):
        names = getattr(owner, attribute, None)
        if isinstance(names, (list, tuple)) and names:
            return tuple(map(str, names))
    return ()


def _stated(given: list[float], loader: Any, name: str) -> list[float]:
    """What the caller has said of the images' normalisation, or the loader says."""
    return list(given) or [float(value) for value in getattr(loader, name, ())]


def _configured(given: Mapping[str, Any]) -> CN:
    defaults: dict[str, Any] = dict(_DEFAULTS)
    if "SOLVER.LR_DECAY_STAGES" not in given:
        defaults["SOLVER.LR_SCHEDULE"] = "cosine"
    return cfg_of(tree_of({**defaults, **given}))


def _trainer(
    student: Given, teacher: Given, train_loader: Any, val_loader: Any, cfg: CN, batch: Mapping[str, Any], name: str
) -> BaseTrainer:
    """The trainer, with everything checked and nothing written yet."""
    trainer_class, method = trainer_dict[cfg.SOLVER.TRAINER], distiller_dict[cfg.DISTILLER.TYPE]
    check_modes(cfg, method, trainer_class.update_rule, 1)
    data = cfg.DATASET
    told = {"num_classes": data.NUM_CLASSES, "image_size": data.IMAGE_SIZE, "mean": data.MEAN, "std": data.STD}
    mixes = bool(data.MIXUP or data.CUTMIX or data.ERASING)  # drawn for each image's index
    train_loader = prepared(train_loader, batch, [*method.needs_batch, *([INDEX] if mixes else [])], told)
    val_loader = telling(val_loader, told)
    facts = RunFacts.of(cfg, train_loader)
    facts = replace(facts, num_data=facts.num_data or count_of(train_loader))
    seed_everything(cfg.EXPERIMENT.SEED)
    distiller = method_of(cfg, student, teacher, facts)
    trainer: BaseTrainer = trainer_class(name, distiller, train_loader, val_loader, cfg)
    check_scores(distiller, facts.image_size)
    return trainer


def _train(trainer: BaseTrainer, resume: bool, verbose: bool) -> None:
    try:
        if verbose:
            trainer.train(resume)
        else:
            trainer.run(trainer.begin(resume, trainer.overwrite))
    except Stopped as stopped:
        if stopped.code == 128 + signal.SIGINT:
            raise KeyboardInterrupt("training stopped; with output=FOLDER, resume=True goes on from here") from None
        raise


def _result(trainer: BaseTrainer, given: Given, folder: Path | None) -> Result:
    """The best weights in the networks, and what the run has logged."""
    distiller, ema = trainer.distiller.eval(), trainer.ema
    main = distiller.main_network()
    load_model_weights(main, trainer.log_path / "student_best")
    if ema is not None:
        load_model_weights(ema.network, trainer.log_path / "student_best_ema")
    best = trainer.state.best_acc
    alone = main is distiller.student
    average = None if ema is None else released(ema.network, given) if alone else ema.network
    with torch.no_grad():
        return Result(
            # What is deployed around the student reads its maps, by hooks that the caller's network will lose.
            student=released(main, given) if alone else copy_without_hooks(main),
            accuracy=next(iter(best.values())),
            history=[{**row, "epoch": int(row["epoch"])} for row in read_epochs(trainer.log_path)],
            ema=average,
            ema_accuracy=best.get("ema"),
            folder=folder,
            marks=found_weights(trainer.log_path / "student_best")[1],
        )
