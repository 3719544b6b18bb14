"""Builds a run from its configuration: networks, distiller and trainer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from yacs.config import CfgNode as CN

from ..dataset import DatasetInfo, dataset_dict, dataset_info, get_dataset, info_of
from ..distillers import Distiller, RunFacts, distiller_dict
from ..distillers.contract import check_scores
from ..distributed.ranks import current_ranks
from ..errors import UserError
from ..models import teacher_checkpoint
from ..models.copies import has_hooks
from ..models.cost import network_cost
from ..models.native import FAMILIES, family_of, native_input
from ..models.returned import Doubt, explained, tried
from ..models.sources import is_foreign
from ..registry import Registry, unknown_name
from .cfg import load_cfg
from .files.checkpoint import (
    DEPLOYED,
    HEAD,
    INPUT,
    description_of,
    distiller_state,
    is_of_run,
    load_checkpoint,
    load_state,
    marks,
    model_state,
)  # fmt: skip
from .modes import check_modes
from .networks import (
    Named,
    fresh,
    frozen_teacher,
    seeing_its_own,
    starting_student,
    teacher_classes,
    untrained_teacher,
    with_weights,
)
from .run_name import experiment_name
from .runtime.device import pick_device
from .runtime.seeds import seed_everything
from .trainer import BaseTrainer, trainer_dict


def model_dict(dataset: str | DatasetInfo, network: str = "") -> Registry:
    """The networks of a data set, by name; for data of any size those among which `network` is."""
    info: DatasetInfo = dataset_info[dataset] if isinstance(dataset, str) else dataset
    family = info.model_family if info.model_family != "any" else family_of(network, info.image_size)
    return FAMILIES[family][0]


def build_pretrained(
    dataset: str | DatasetInfo,
    name: str,
    num_classes: int,
    path: str = "",
    groups: str = "",
    image_size: int = 0,
    feats: Sequence[str] = (),
) -> nn.Module:
    """The network `name` with trained weights, behind what its own images differ in from those of a data set.

    Args:
        dataset: its name, or its facts.
        path: its checkpoint file; empty means the published one: under download_ckpts, from torchvision (ImageNet), or
            from the network's own source.
        groups: for the checkpoint of a plain network that DCGD grouped: a grouping file, or the name of a published
            grouping.
        image_size: to which images are resized for it; 0: they are not.
        feats: the layers that give its feature maps; empty: found.

    Raises:
        UserError: no such network, no checkpoint, or a checkpoint of another network.
    """
    info: DatasetInfo = dataset_info[dataset] if isinstance(dataset, str) else dataset
    named = Named(name, info.model_family, num_classes, image_size or info.image_size, feats)
    network, told = with_weights(named, path, groups)
    return seeing_its_own(network, named, info.mean, info.std, info.image_size, told)


def load_trained(
    dataset: str | DatasetInfo,
    model: str,
    ckpt: str = "pretrain",
    groups: str = "",
    device: str = "auto",
    image_size: int = 0,
    feats: Sequence[str] = (),
) -> nn.Module:
    """A trained network on `device`, in eval mode, from the names given on a command line.

    Args:
        dataset: its name, or its facts, see `own_view`; the network has its number of classes.
        model: the network's name.
        ckpt: its checkpoint; "pretrain" is the published one.
        groups, image_size, feats: see `build_pretrained`.

    Raises:
        UserError: an unknown name, a checkpoint of another network, or no such device.
    """
    where, path = pick_device(device), "" if ckpt == "pretrain" else ckpt
    info: DatasetInfo = dataset_info[dataset] if isinstance(dataset, str) else dataset
    return build_pretrained(info, model, info.num_classes, path, groups, image_size, feats).to(where).eval()


def own_view(dataset: str | DatasetInfo, model: str, ckpt: str = "pretrain") -> DatasetInfo:
    """The data set as the network `model` is to see it: its images at the network's size, crop and normalisation.

    Those are the ones that its checkpoint was trained with, if a run of this library has written it, or else those that
    its source states. Data sets whose images have one size are seen as they are, and so is a data set of fixed facts by
    the networks of its registry.

    Raises:
        UserError: no such data set or checkpoint.
    """
    info: DatasetInfo = dataset_info[dataset] if isinstance(dataset, str) else dataset
    if info.at is None or (info.model_family != "any" and not is_foreign(model)):
        return info
    told = {} if ckpt == "pretrain" else description_of(load_checkpoint(teacher_checkpoint(ckpt, model))).get(INPUT, {})
    size = told.get("image_size") or info.image_size
    native = native_input(model, size)
    if told.get("mean") and told.get("std"):
        native = replace(native, size=size, mean=tuple(told["mean"]), std=tuple(told["std"]))
    now = (info.image_size, tuple(info.mean), tuple(info.std))
    return info if (native.size, tuple(native.mean), tuple(native.std)) == now else info.at(native)


def build_distiller(cfg: CN, facts: RunFacts, trained: bool = True) -> Distiller:
    """The distiller of the method `DISTILLER.TYPE`, with its student and teacher.

    Args:
        trained: give the networks their trained weights; without them, no file is read.
    """
    method = distiller_dict[cfg.DISTILLER.TYPE]
    # The student is built first, so that with the same seed it starts from the same weights under every method.
    info = info_of(cfg)
    named = Named.of(cfg, "STUDENT", info, facts)
    student = starting_student(cfg, named, facts.class_names) if trained else fresh(named)
    teacher = None
    if method.needs_teacher and trained:
        teacher = frozen_teacher(cfg, info, facts, method)
    elif method.needs_teacher:
        teacher = untrained_teacher(cfg, info, facts)
    found = [_tried(network, role, cfg, facts) for role, network in (("student", student), ("teacher", teacher))]
    with explained([doubt for doubt in found if isinstance(doubt, Doubt)]):
        return method.from_run(student, teacher, cfg, facts)


def _tried(network: nn.Module | None, role: str, cfg: CN, facts: RunFacts) -> Tensor | Doubt | None:
    """What `network` returns for images of the data set's size; see `tried`."""
    if network is None or has_hooks(network):
        return None
    shape = (2, 3, facts.image_size, facts.image_size)
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    trains, read = role == "student", distiller_dict[cfg.DISTILLER.TYPE].teacher_outputs or ()
    # A teacher of other classes can still teach its features.
    classes = facts.num_classes if trains or "logits" in read else 0
    return tried(network, image, f"the {role} {cfg.DISTILLER[role.upper()]}", trains, classes)


def facts_without_data(cfg: CN) -> RunFacts:
    """The facts of a run with placeholders for what only its data tell; enough for its networks and their cost."""
    facts = RunFacts.of(cfg)
    names = tuple(map(str, range(facts.num_classes)))
    mean, std = facts.mean or (0.0, 0.0, 0.0), facts.std or (1.0, 1.0, 1.0)
    return replace(facts, num_data=1, class_names=names, mean=mean, std=std)


def load_deployed(ckpt: Path, device: str = "auto") -> tuple[Distiller, list[str], CN]:
    """The method of a run, in eval mode, with the weights of one of the run's checkpoints.

    Args:
        ckpt: `student_best`, `best`, ...; config.yaml lies beside it.

    Returns:
        The distiller; the names of the deployments whose weights it has: of all from a whole run's checkpoint, else of
        those that the file holds; and the run's configuration.

    Raises:
        UserError: no config.yaml, or a checkpoint of another network.
    """
    source = ckpt.parent / "config.yaml"
    if not os.path.isfile(source):
        raise UserError(f"no config.yaml next to {ckpt} says which network it holds; name it, such as -m resnet20")
    cfg = load_cfg(source)
    distiller, content = build_distiller(cfg, facts_without_data(cfg), trained=False), load_checkpoint(ckpt)
    names = list(distiller.deployments())
    if is_of_run(content):
        state = distiller_state(content, ckpt)
        for name in names:
            network = distiller.network_to_save(name)
            own = _names_within(distiller, network)
            load_state(network, {key: state[full] for key, full in own.items() if full in state}, ckpt)
    else:
        held = marks(content).get(HEAD, names[0])
        if held not in names:
            raise unknown_name(f"deployment in {ckpt}", held, names)
        if marks(content).get(DEPLOYED) not in (None, type(distiller.network_to_save(held)).__name__):
            distiller.merge()  # the file may hold the merged network
        network = distiller.network_to_save(held)
        load_state(network, model_state(content, ckpt), ckpt)
        names = [name for name in names if distiller.network_to_save(name) is network]
    return distiller.to(pick_device(device)).eval(), names, cfg


def _names_within(distiller: Distiller, network: nn.Module) -> dict[str, str]:
    """The name that each entry of the network's state has in the distiller's."""
    names = {id(tensor): key for key, tensor in distiller.state_dict(keep_vars=True).items()}
    own = network.state_dict(keep_vars=True)
    return {name: names[id(tensor)] for name, tensor in own.items() if id(tensor) in names}


def deployment_lines(trainer: BaseTrainer) -> list[str]:
    """The cost of each network that the run can deploy, one line each: `student: 0.28 M parameters, 41.4 M MACs`."""
    size = info_of(trainer.cfg).image_size
    return [f"{name}: {network_cost(net, size)}" for name, net in trainer.distiller.deployments().items()]


def frozen_lines(trainer: BaseTrainer) -> list[str]:
    """What runs in place of each frozen network, one line each: `teacher: a copy with its BatchNorms folded`."""
    frozen = trainer.step.frozen
    return [] if frozen is None else [f"{name}: {words}" for name, words in frozen.words.items()]


def step_lines(trainer: BaseTrainer) -> list[str]:
    """How full batches are trained on, one line: `step: one CUDA graph, ...`; none for a run that does so as usual."""
    return [f"step: {trainer.take_step.words}"] if trainer.take_step.words else []


# Settings that a run's data tells where they are 0 or [].
TOLD_BY_DATA = ("DATASET.NUM_CLASSES", "DATASET.IMAGE_SIZE", "DATASET.MEAN", "DATASET.STD")


def resolved(cfg: CN) -> CN:
    """The configuration with what its data tells written into it: classes, image size and normalisation.

    So that a run's config.yaml describes its networks without the data. The facts of a fixed data set are not settings.

    Raises:
        UserError: see `info_of`; or images without labels, and a teacher that does not tell how many classes it knows.
    """
    info = info_of(cfg)
    if cfg.DATASET.TYPE in dataset_dict:
        return cfg
    if not info.labelled and not info.num_classes:
        info = replace(info, num_classes=teacher_classes(cfg, info))
    told = cfg.clone()
    told.defrost()
    told.DATASET.NUM_CLASSES, told.DATASET.IMAGE_SIZE = info.num_classes, info.image_size
    told.DATASET.MEAN, told.DATASET.STD = list(info.mean), list(info.std)
    told.freeze()
    return told


def build_trainer(cfg: CN, overrides: Sequence[str] = (), name: str | None = None) -> BaseTrainer:
    """The trainer of a run, with everything checked and nothing written to disk yet.

    Args:
        name: of the run; None: its `experiment_name`.

    Raises:
        UserError: a setting or a file is wrong; the message says what to do.
    """
    # Unknown names, and what does not go together, are reported first: loading the data may take minutes.
    trainer_class, method = trainer_dict[cfg.SOLVER.TRAINER], distiller_dict[cfg.DISTILLER.TYPE]
    check_modes(cfg, method, trainer_class.update_rule, current_ranks().world)
    cfg = resolved(cfg)
    seed_everything(cfg.EXPERIMENT.SEED)
    with current_ranks().one_first():  # data may have to be downloaded or decoded, once for all ranks
        train_loader, val_loader, *_ = get_dataset(cfg)
    facts = RunFacts.of(cfg, train_loader)
    distiller = build_distiller(cfg, facts)
    trainer = trainer_class(name or experiment_name(cfg, overrides), distiller, train_loader, val_loader, cfg)
    check_scores(distiller, facts.image_size)
    return trainer
