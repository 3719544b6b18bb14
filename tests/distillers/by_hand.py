"""Methods that are built by hand, from networks and the settings of one section."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from yacs.config import CfgNode as CN

from mdistiller.distillers import Distiller, method_defaults
from mdistiller.distillers.contract import check_distiller
from mdistiller.models import cifar_model_dict

from .checks import normal


def network(name: str, classes: int = 10, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return cifar_model_dict[name][0](num_classes=classes)


def built(method: type[Distiller], student: nn.Module, teacher: nn.Module, **own: Any) -> Distiller:
    """In training mode, for images of 32 pixels, with these settings of its section; it keeps to the contract."""
    section = method.config_section
    cfg = CN({section: method_defaults[section].clone()})
    cfg.merge_from_list([x for key, value in own.items() for x in (f"{section}.{key}", value)])
    distiller = method(student, teacher, cfg, 32)
    check_distiller(distiller)
    return distiller.train()


def batch(images: int = 4, size: int = 32, epoch: int = 1) -> dict[str, Any]:
    return {"image": normal(images, 3, size, size).float(), "target": torch.arange(images) % 10, "epoch": epoch}
