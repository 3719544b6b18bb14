"""A faster form of the teacher for training, which computes the same function."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from yacs.config import CfgNode as CN

from ...dataset import dataset_info
from ...distillers import Distiller
from .cache import OUTPUTS, TeacherCache, require_cacheable
from .fold_batchnorm import fold_batchnorm

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def speed_up_teacher(distiller: Distiller, loader: Any, cfg: CN) -> TeacherCache | None:
    """Make the teacher faster: fold its BatchNorms and, if `cfg` asks for it, use half precision and a cache.

    The module `distiller.teacher` and the checkpoints do not change. A teacher that runs in training mode (OFD) is left
    alone, because its BatchNorms use the statistics of the batch.

    Args:
        loader: the loader of the training images, for the cache.

    Returns:
        The cache, or None if DISTILLER.TEACHER_CACHE is not set.

    Raises:
        UserError: a cache is asked for, but the method, the data or the folder does not allow one.
    """
    if cfg.DISTILLER.TEACHER_CACHE:
        require_cacheable(distiller, loader)
    if not distiller.needs_teacher or distiller.teacher_in_train_mode:
        return None
    size = dataset_info[cfg.DATASET.TYPE].image_size
    like = next(distiller.teacher.parameters())
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(like)
    features = None if set(distiller.teacher_outputs) - set(OUTPUTS) else ["pooled_feat"]
    runner: Callable[[Tensor], Any] = _faster(distiller.teacher, image, features, cfg)
    cache = None
    if cfg.DISTILLER.TEACHER_CACHE:
        runner = cache = TeacherCache(
            Path(cfg.DISTILLER.TEACHER_CACHE), distiller.teacher, runner, image, loader, distiller.teacher_outputs,
            cfg.DISTILLER.TEACHER_CACHE_DTYPE, int(cfg.DISTILLER.TEACHER_CACHE_GIB * 2**30),
        )  # fmt: skip
    distiller.run_teacher_by(runner)
    return cache


def _faster(teacher: nn.Module, image: Tensor, features: list[str] | None, cfg: CN) -> Callable[[Tensor], Any]:
    folded = fold_batchnorm(teacher.eval(), image, features)
    network = folded or teacher
    if cfg.SOLVER.CHANNELS_LAST:
        network.to(memory_format=torch.channels_last)
    precision, _, only = cfg.SOLVER.AMP.partition("-")
    if precision in DTYPES:
        network = HalfPrecision(network, DTYPES[precision], full_output=bool(only))
    # Dynamo compiles the teacher into the student's graph, which inference mode would break.
    return network if cfg.SOLVER.COMPILE else Inference(network)


class HalfPrecision(nn.Module):
    """A copy of a trained network whose convolutions and linear layers compute in half precision.

    Their weights are converted once; autocast would convert those of a frozen network at every step. The remaining
    BatchNorms keep float32 statistics.

    Args:
        full_output: return float32, for a student that is not in half precision.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype, full_output: bool) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)
        self.dtype = dtype
        self.full_output = full_output
        for layer in self.network.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.to(dtype)

    def forward(self, image: Tensor) -> Any:
        with torch.autocast(image.device.type, enabled=False):
            output = self.network(image.to(self.dtype))
        return _each_tensor(Tensor.float, output) if self.full_output else output


class Inference:
    """A network under torch.inference_mode: without autograd graph and version counters.

    Inference tensors cannot be saved for a backward pass, so the logits are copied, and each feature when it is read.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def __call__(self, image: Tensor) -> Any:
        with torch.inference_mode():
            logits, features = self.network(image)
        return logits.clone(), _CopiedWhenRead(features)


class _CopiedWhenRead(dict[str, Any]):
    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        self[key] = value = _each_tensor(_ordinary, value)
        return value


def _ordinary(x: Tensor) -> Tensor:
    return x.clone() if x.is_inference() else x


def _each_tensor(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with `change` applied to every tensor in its dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _each_tensor(change, v) for key, v in value.items()}
    return type(value)(_each_tensor(change, v) for v in value)
