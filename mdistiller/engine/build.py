"""From a configuration to the parts of a run: networks, distiller, trainer; and the run's name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch.nn as nn
from yacs.config import CfgNode as CN

from ..dataset import dataset_info, get_dataset
from ..distillers import Distiller, distiller_dict
from ..models import build_model, teacher_checkpoint
from .cfg import override_pairs
from .checkpoint import load_model_weights
from .runtime import seed_everything
from .trainer import BaseTrainer, trainer_dict

# Overrides that say where and how a run is carried out, not what it is: they stay out of its name.
_MACHINE_KEYS = re.compile(r"LOG\.|EXPERIMENT\.(PROJECT|NAME|TAG|DEVICE)$|DATASET\.(ROOT|NUM_WORKERS|TEST\.BATCH_SIZE)$")


def experiment_name(cfg: CN, overrides: Sequence[str] = ()) -> str:
    """`<project>/<name or tag>` plus `KEY:VALUE` of the overrides, fit for a path."""
    name = cfg.EXPERIMENT.NAME or cfg.EXPERIMENT.TAG
    name += ",".join(f"{k}:{v}" for k, v in override_pairs(overrides) if not _MACHINE_KEYS.match(k))
    return f"{_path_part(cfg.EXPERIMENT.PROJECT)}/{_path_part(name)}"


def _path_part(name: str) -> str:
    """`name` as one folder's name: separators, blanks and control characters become `_`, as do leading dots."""
    return re.sub(r"^\.+|[/\\*?\"<>|\s\x00-\x1f]", "_", name) or "_"


def build_teacher(cfg: CN, num_classes: int) -> nn.Module:
    """The teacher with its weights: `DISTILLER.TEACHER_CKPT`, or the published ones where that is empty.

    Raises:
        UserError: no such network, or no weights for it.
    """
    family = dataset_info[cfg.DATASET.TYPE].model_family
    name = cfg.DISTILLER.TEACHER
    path = cfg.DISTILLER.TEACHER_CKPT or teacher_checkpoint(family, name)
    model = build_model(family, name, num_classes, pretrained=path is None)
    if path is not None:
        load_model_weights(model, path)
    return model


def build_student(cfg: CN, num_classes: int) -> nn.Module:
    """The student, freshly initialised."""
    return build_model(dataset_info[cfg.DATASET.TYPE].model_family, cfg.DISTILLER.STUDENT, num_classes)


def build_distiller(cfg: CN, num_data: int, num_classes: int) -> Distiller:
    """The method that `DISTILLER.TYPE` names, around its student and teacher.

    Args:
        num_data: size of the training set.
    """
    method = distiller_dict[cfg.DISTILLER.TYPE]
    # The student comes first: with the same seed it starts from the same weights under every method.
    student = build_student(cfg, num_classes)
    teacher = build_teacher(cfg, num_classes) if method.needs_teacher else None
    facts = {"num_data": num_data}
    return method(student, teacher, cfg, **{fact: facts[fact] for fact in method.needs_run})


def build_trainer(cfg: CN, overrides: Sequence[str] = ()) -> BaseTrainer:
    """Everything that a run needs, checked, with nothing written to disk yet.

    Raises:
        UserError: something in the configuration or on the disk is not as it must be; says what to do.
    """
    # Unknown names are told first: they cost nothing to find and data may take minutes to load.
    trainer_class = trainer_dict[cfg.SOLVER.TRAINER]
    dataset_info[cfg.DATASET.TYPE], distiller_dict[cfg.DISTILLER.TYPE]
    seed_everything(cfg.EXPERIMENT.SEED)
    train_loader, val_loader, num_data, num_classes = get_dataset(cfg)
    distiller = build_distiller(cfg, num_data, num_classes)
    return trainer_class(experiment_name(cfg, overrides), distiller, train_loader, val_loader, cfg)


def run_folder(cfg: CN, name: str) -> Path:
    """Where the run called `name` keeps its files."""
    return Path(cfg.LOG.PREFIX) / name
