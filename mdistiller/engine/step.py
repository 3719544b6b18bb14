"""One training step: a batch's forward and backward passes, the NaN policy, the update of the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor
from yacs.config import CfgNode as CN

from ..distillers import Distiller
from ..distributed.data_parallel import averaging, data_parallel
from ..distributed.ranks import Ranks
from ..errors import UserError
from .ema import EMA
from .nan_watch import NanPolicy
from .scores import correct_counts
from .teacher.cache import TeacherCache
from .teacher.fast_teacher import DTYPES
from .update import SumUpdate

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class StepResult:
    """The result of a step that was not skipped.

    Attributes:
        images: number of images on this rank.
        sums: accuracies, total loss and loss terms, each () summed over the images.
        grad_norm: () L2 norm of the gradients, if it was computed.
    """

    images: int
    sums: dict[str, Tensor]
    grad_norm: Tensor | None


class Step:
    """Takes one step on one batch, without waiting for the device.

    Args:
        distiller: on `device`.
        update: the update rule of the distiller's parameters.
        ema: the EMA of the student, or None.
        teacher_cache: the cache of the teacher's outputs, or None.
    """

    def __init__(
        self, distiller: Distiller, update: SumUpdate, nan_policy: NanPolicy, ema: EMA | None,
        teacher_cache: TeacherCache | None, device: torch.device, ranks: Ranks, cfg: CN,
    ) -> None:  # fmt: skip
        self.distiller, self.update, self.nan_policy, self.ema = distiller, update, nan_policy, ema
        self.teacher_cache = teacher_cache
        self.device = device
        self.micro_batches = cfg.SOLVER.ACCUMULATE
        self.autocast_dtype = DTYPES.get(cfg.SOLVER.AMP)
        self.module = self._module(ranks, cfg)

    def _module(self, ranks: Ranks, cfg: CN) -> nn.Module:
        """The module that the step calls: the distiller, compiled and data-parallel if the run asks for it."""
        if cfg.SOLVER.COMPILE:
            # "reduce-overhead" uses CUDA graphs.
            self.distiller.compile_training(mode="reduce-overhead" if self.device.type == "cuda" else None)
        if ranks.world == 1 or not self.update.one_backward:
            return self.distiller
        return data_parallel(self.distiller, [f"teacher.{name}" for name in self.distiller.teacher.state_dict()])

    def __call__(self, batch: Batch, epoch: int, number: int, measure: bool = False) -> StepResult | None:
        """Take the step; None where the NaN policy skips it.

        Args:
            number: the step's number in its epoch, from 1.
            measure: also compute the norm of the gradients.

        Raises:
            NonFiniteLossError: a loss is not finite, and the NaN policy says stop.
        """
        self.nan_policy.begin_step()
        images = len(batch["target"])
        sums: dict[str, Tensor] = {}
        micro_batches = split_batch(batch, self.micro_batches)
        for count, micro_batch in enumerate(micro_batches, start=1):
            # A short batch may give fewer micro-batches than asked for.
            weight, last = len(micro_batch["target"]) / images, count == len(micro_batches)
            losses, totals = self._run_micro_batch(micro_batch, epoch, weight, last)
            if self.nan_policy.drops(epoch, number, losses, micro_batch.get("index", micro_batch["target"][:0])):
                self.update.drop()
                return None
            sums = {name: sums[name] + value if sums else value for name, value in totals.items()}
        norm = self.update.step(measure)
        if self.ema is not None:
            self.ema.update(self.distiller.student)
        return StepResult(images, sums, norm)

    def _run_micro_batch(
        self, micro_batch: Batch, epoch: int, weight: float, last: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Forward and backward pass of a micro-batch; returns its losses, and its metrics as sums over its images."""
        if self.teacher_cache is not None:
            self.teacher_cache.look_up(micro_batch["index"])
        dtype = self.autocast_dtype
        with averaging(self.module, now=last):
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                logits, losses = self.module(**micro_batch, epoch=epoch)
            total = self.update.backward(losses, weight)
        target = micro_batch["target"]
        top1, top5 = correct_counts(logits.detach(), target).unbind()
        totals = {"train_acc": 100 * top1, "train_acc_top5": 100 * top5, "train_loss": total * len(target)}
        return losses, totals | {f"loss/{k}": loss.detach().mean() * len(target) for k, loss in losses.items()}


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """Split a batch into micro-batches of about equal size."""
    if parts == 1:
        return [batch]
    pieces = {name: tensor.chunk(parts) for name, tensor in batch.items()}
    return [dict(zip(pieces, values)) for values in zip(*pieces.values())]


def check_batch_size(distiller: Distiller, cfg: CN, world: int) -> None:
    """Refuse a batch that cannot be divided among the ranks, or into micro-batches, as the configuration asks.

    Raises:
        UserError: naming SOLVER.BATCH_SIZE or SOLVER.ACCUMULATE.
    """
    batch, micro_batches = cfg.SOLVER.BATCH_SIZE, cfg.SOLVER.ACCUMULATE
    if batch % world:
        raise UserError(f"SOLVER.BATCH_SIZE {batch} cannot be shared evenly by {world} processes; take a multiple")
    if micro_batches > batch // world:
        raise UserError(f"SOLVER.ACCUMULATE {micro_batches} is more than the {batch // world} images of a batch")
    if micro_batches > 1 and distiller.compares_images:
        raise UserError(
            f"SOLVER.ACCUMULATE {micro_batches}: {type(distiller).__name__} compares the images of a batch with each "
            "other, so micro-batches would give a different loss; set it to 1"
        )
