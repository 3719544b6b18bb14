"""Builds a run from its configuration: networks, distiller and trainer."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn as nn
from yacs.config import CfgNode as CN

from ..dataset import dataset_info, get_dataset
from ..distillers import Distiller, distiller_dict
from ..distributed.ranks import current_ranks
from ..grouping import load_groups
from ..models import build_model, cifar_model_dict, imagenet_model_dict, teacher_checkpoint, tiny_imagenet_model_dict
from ..models.cost import network_cost
from ..models.grouped import GroupedStudent
from ..registry import Registry
from .files.checkpoint import load_model_weights
from .run_name import experiment_name
from .runtime.device import pick_device
from .runtime.seeds import seed_everything
from .trainer import BaseTrainer, trainer_dict


def model_dict(dataset: str) -> Registry:
    """The networks of a data set, by name."""
    families = {"cifar": cifar_model_dict, "tiny_imagenet": tiny_imagenet_model_dict, "imagenet": imagenet_model_dict}
    return families[dataset_info[dataset].model_family]


def build_pretrained(dataset: str, name: str, num_classes: int, path: str = "", groups: str = "") -> nn.Module:
    """The network `name` with trained weights.

    Args:
        path: its checkpoint file; empty means the published one, under download_ckpts or (ImageNet) from torchvision.
        groups: for the checkpoint of a plain network that DCGD grouped: a grouping file, or the name of a published
            grouping.

    Raises:
        UserError: no such network, no checkpoint, or a checkpoint of another network.
    """
    models = model_dict(dataset)
    entry = models[name]
    if not path and not isinstance(entry, tuple):
        return build_model(models, name, num_classes, pretrained=True)
    model = build_model(models, name, num_classes)
    if groups:
        model = GroupedStudent(model, load_groups(groups))
    load_model_weights(model, teacher_checkpoint(path or entry[1], name))
    return model


def load_trained(dataset: str, model: str, ckpt: str = "pretrain", groups: str = "", device: str = "auto") -> nn.Module:
    """A trained network on `device`, in eval mode, from the names given on a command line.

    Args:
        dataset, model: names; the network has the data set's number of classes.
        ckpt: its checkpoint; "pretrain" is the published one.
        groups: see `build_pretrained`.

    Raises:
        UserError: an unknown name, a checkpoint of another network, or no such device.
    """
    where = pick_device(device)
    path = "" if ckpt == "pretrain" else ckpt
    return build_pretrained(dataset, model, dataset_info[dataset].num_classes, path, groups).to(where).eval()


def build_distiller(cfg: CN, num_data: int, num_classes: int) -> Distiller:
    """The distiller of the method `DISTILLER.TYPE`, with its student and teacher.

    Args:
        num_data: size of the training set.
    """
    method = distiller_dict[cfg.DISTILLER.TYPE]
    # The student is built first, so that with the same seed it starts from the same weights under every method.
    student = build_model(model_dict(cfg.DATASET.TYPE), cfg.DISTILLER.STUDENT, num_classes)
    teacher = None
    if method.needs_teacher:
        teacher = build_pretrained(cfg.DATASET.TYPE, cfg.DISTILLER.TEACHER, num_classes, cfg.DISTILLER.TEACHER_CKPT)
    return method.from_run(student, teacher, cfg, {"num_data": num_data})


def deployment_lines(trainer: BaseTrainer) -> list[str]:
    """The cost of each network that the run can deploy, one line each: `student: 0.28 M parameters, 41.4 M MACs`."""
    size = dataset_info[trainer.cfg.DATASET.TYPE].image_size
    return [f"{name}: {network_cost(net, size)}" for name, net in trainer.distiller.deployments().items()]


def build_trainer(cfg: CN, overrides: Sequence[str] = ()) -> BaseTrainer:
    """The trainer of a run, with everything checked and nothing written to disk yet.

    Raises:
        UserError: a setting or a file is wrong; the message says what to do.
    """
    # Unknown names are reported first: finding them costs nothing, while loading the data may take minutes.
    trainer_class = trainer_dict[cfg.SOLVER.TRAINER]
    dataset_info[cfg.DATASET.TYPE], distiller_dict[cfg.DISTILLER.TYPE]
    seed_everything(cfg.EXPERIMENT.SEED)
    with current_ranks().one_first():  # data may have to be downloaded or decoded, once for all ranks
        train_loader, val_loader, num_data, num_classes = get_dataset(cfg)
    distiller = build_distiller(cfg, num_data, num_classes)
    return trainer_class(experiment_name(cfg, overrides), distiller, train_loader, val_loader, cfg)

