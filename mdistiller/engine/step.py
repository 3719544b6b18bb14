"""One training step: a batch's forward and backward passes, the NaN policy, the update of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from yacs.config import CfgNode as CN

from ..console import warn
from ..distillers import Distiller
from ..distillers.contract import check_losses, check_parameters, gradient_gap, not_averaged
from ..distributed.data_parallel import averaging, data_parallel, is_data_parallel, release
from ..distributed.ranks import Ranks
from ..errors import UserError
from .ema import EMA
from .kept_buffers import KeptBuffers
from .meters import Meters, Names
from .nan_watch import NanPolicy, Outcome
from .scores import correct_counts
from .single_images import cannot_train, is_of_one_value, too_few_images
from .teacher.cache import TeacherCache
from .teacher.fast_teacher import DTYPES, FrozenNetworks
from .update import SumUpdate

Batch = dict[str, Tensor]

# The metrics of every step before its losses; see `Step._run_micro_batch`.
METRICS = ("train_acc", "train_acc_top5", "train_loss")
_NO_GRADIENT = "train what uses them, such as a grouped student by DCGD, or name them in the method's `untrained`"


@dataclass(frozen=True)
class StepResult:
    """The result of a step that was not skipped.

    Attributes:
        images: number of images on this rank.
        names: of the accuracies, the total loss and the loss terms.
        sums: (len(names),) float64, each summed over the images.
        grad_norm: () L2 norm of the gradients before clipping.
    """

    images: int
    names: Names
    sums: Tensor
    grad_norm: Tensor


class Step:
    """Takes one step on one batch, without waiting for the device.

    Args:
        distiller: on `device`.
        update: the update rule of the distiller's parameters.
        ema: the EMA of the distiller's main network, or None.
        frozen: the faster forms of the distiller's frozen networks; None: they run themselves.
        in_graph: whether a `GraphedStep` is to record the whole of it.
    """

    def __init__(
        self, distiller: Distiller, update: SumUpdate, nan_policy: NanPolicy, ema: EMA | None,
        frozen: FrozenNetworks | None, device: torch.device, ranks: Ranks, cfg: CN, in_graph: bool = False,
    ) -> None:  # fmt: skip
        self.distiller, self.update, self.nan_policy, self.ema = distiller, update, nan_policy, ema
        self.in_graph = in_graph
        self.frozen = frozen
        self.cfg = cfg
        self.device = device
        self.micro_batches = cfg.SOLVER.ACCUMULATE
        self.full_batch = cfg.SOLVER.BATCH_SIZE // ranks.world
        self.autocast_dtype = DTYPES.get(cfg.SOLVER.AMP)
        self.ranks = ranks
        self.compiled = cfg.SOLVER.COMPILE
        self._gradients_checked = False
        self._takes_one_image = False  # once a single image has passed
        self._left_out_said = False
        self._built: nn.Module | None = None

    @property
    def module(self) -> nn.Module:
        """The module that the step calls: the distiller, compiled and data-parallel if the run asks for it.

        Made for the first step, as it is for the parameters that require gradients then: stages before training come
        first, and train others.
        """
        if self._built is None:
            self._built = self._module()
        return self._built

    @module.setter
    def module(self, own: nn.Module) -> None:
        self._built = own

    def close(self) -> None:
        """Take no steps for now: other parameters are trained meanwhile."""
        if self._built is not None:
            release(self._built)
        self._built = None

    def _module(self) -> nn.Module:
        if self.compiled:
            whole: Batch = {"target": torch.empty(self.full_batch)}
            sizes = {len(part["target"]) for part in split_batch(whole, self.micro_batches, self.full_batch)}
            passes = 1 if self.update.one_backward else 2
            mode = "reduce-overhead" if self._cuda_graphs() else None
            self.distiller.compile_training(sizes, passes, self.update.ready_to_compile, mode=mode)
        if self.ranks.world == 1 or not self.update.one_backward:
            return self.distiller
        return data_parallel(self.distiller, not_averaged(self.distiller))

    def _cuda_graphs(self) -> bool:
        """Whether torch.compile is to make CUDA graphs of the passes, where none of the whole step is recorded.

        It can where each pass runs once, and nothing that it returns is needed after that: their outputs are
        overwritten by the next run. The gradients of a micro-batch must outlast the next one, and those of DOT's first
        backward pass the second; DistributedDataParallel sends them while the pass goes on.
        """
        once = self.micro_batches == 1 and self.update.one_backward and self.ranks.world == 1
        return once and not self.in_graph and self.device.type == "cuda"

    def __call__(self, batch: Batch, epoch: int, number: int, meters: Sequence[Meters] = ()) -> StepResult | None:
        """Take the step; None where the NaN policy skips it, or where the networks cannot train on a single image.

        Args:
            number: the step's number in its epoch, from 1.
            meters: the step's metrics are added to each.

        Raises:
            NonFiniteLossError: a loss or a gradient is not finite, and the NaN policy says stop.
            UserError: in the first step, see `_check_gradients` and `_run_if_enough`.
        """
        self.check_frozen(number, also_later=self.compiled)
        self.nan_policy.begin_step()
        with self.distiller.one_step():
            passed = self._run_if_enough(batch, epoch, number)
        if passed is None:
            self.update.skip()
            return None
        names, sums = passed
        self._check_gradients()
        images, norm = len(batch["target"]), self.update.norm()
        losses, index = sums[len(METRICS) :] / images, batch.get("index", batch["target"][:0])
        if self.nan_policy.drops(Outcome(epoch, number, names, losses, self.update.unexplained(norm), index)):
            self.update.skip()
            return None
        self._apply(norm)
        result = StepResult(images, (*METRICS, *(f"loss/{name}" for name in names)), sums, norm)
        for own in meters:
            own.add(images, result.names, sums)
        return result

    def leave_graph(self) -> None:
        """Be a step that nothing records; compiled, its passes may be CUDA graphs of their own again."""
        self.in_graph = False
        if self.compiled and self._cuda_graphs():
            self.module = self._module()

    def whole(self, batch: Batch, epoch: Tensor) -> tuple[Names, Tensor, Tensor]:
        """The step with nothing in it that the host reads or decides, as a CUDA graph can hold it.

        Args:
            epoch: () int64, on the device.

        Returns:
            The names of the loss terms; the metrics, as StepResult's `sums`; and the gradients' norm (2,) float64,
            before clipping and as `SumUpdate.unexplained` leaves it.
        """
        with self.distiller.one_step():
            names, sums = self._run_micro_batches(split_batch(batch, self.micro_batches, self.full_batch), epoch)
        norm = self.update.norm()
        norms = torch.stack([norm, self.update.unexplained(norm)]).double()
        self._apply(norm)
        return names, sums, norms

    def _apply(self, norm: Tensor) -> None:
        """Change what a sound step changes: the parameters, the method's own state, the EMA."""
        self.update.step(norm)
        if self.distiller.stage_on is None:
            with torch.no_grad():
                self.distiller.after_step()
        if self.ema is not None:
            self.ema.update(self.distiller.main_network())

    def check_frozen(self, number: int, also_later: bool) -> None:
        """See what the run has changed in its frozen networks: whole in an epoch's first two steps.

        In every epoch, so that the second step sees what the first one changes. A network checks itself when it is
        called, but not inside a compiled step or a CUDA graph; these check in their later steps too.
        """
        if self.frozen is not None and (number <= 2 or also_later):
            self.frozen.check(thoroughly=number <= 2)

    def begin_epoch(self) -> None:
        """Prepare for the loader's epoch, before its first step, or where it is resumed."""
        if self.frozen is not None:
            self.frozen.begin_epoch()

    @property
    def teacher_cache(self) -> TeacherCache | None:
        """The cache of the teacher's outputs, if there is one."""
        return None if self.frozen is None else self.frozen.cache

    def _check_gradients(self) -> None:
        """In the first step, and on several ranks in every step: name the parameters that got no gradient.

        Raises:
            UserError: there are some, and several ranks, which cannot average them; or the first step has made a layer.
        """
        first, parallel = not self._gradients_checked, is_data_parallel(self.module)
        if not (first or parallel):
            return
        self._gradients_checked = True
        if first:
            check_parameters(self.distiller)
        without = self.update.without_gradient()
        gap = gradient_gap(self.distiller, without) if without else ""
        if gap and parallel:
            raise UserError(f"{gap}, and several processes cannot average what is not there; {_NO_GRADIENT}")
        if gap and self.ranks.first:
            warn(f"{gap}, and keep their values; {_NO_GRADIENT}")

    def _run_if_enough(self, batch: Batch, epoch: int, number: int) -> tuple[Names, Tensor] | None:
        """`_run_micro_batches`; None for the batch of a single image that a user's own loader has left, see below.

        Where a BatchNorm sees 1x1 maps, networks cannot train on one image. Then that batch is left out, and changes
        nothing.

        Raises:
            UserError: they cannot, and it is the epoch's first batch, so that the others are of the same size.
        """
        micro_batches = split_batch(batch, self.micro_batches, self.full_batch)
        if self._takes_one_image or min(len(part["target"]) for part in micro_batches) > 1:
            return self._run_micro_batches(micro_batches, epoch)
        kept = KeptBuffers(self.distiller)
        kept.keep()
        try:
            result = self._run_micro_batches(micro_batches, epoch)
        except ValueError as error:
            if not is_of_one_value(error):
                raise
            kept.restore()
            if number == 1:
                raise too_few_images(self.distiller, self.cfg, self.ranks.world) from None
            if self.ranks.first and not self._left_out_said:
                warn(f"batch {number} is a single image, {cannot_train(self.distiller)}; such a batch is left out")
            self._left_out_said = True
            return None
        self._takes_one_image = True
        return result

    def _run_micro_batches(self, micro_batches: Sequence[Batch], epoch: int | Tensor) -> tuple[Names, Tensor]:
        """Forward and backward passes of a batch; returns the names of its losses, and its metrics summed over images.

        The metrics are those of `METRICS`, then the losses: float64, as StepResult's.
        """
        images = sum(len(part["target"]) for part in micro_batches)
        names: Names = ()
        sums: list[Tensor] = []
        for count, micro_batch in enumerate(micro_batches, start=1):
            # A short batch may give fewer micro-batches than asked for.
            weight, last = len(micro_batch["target"]) / images, count == len(micro_batches)
            names, own = self._run_micro_batch(micro_batch, epoch, weight, last)
            sums.append(own)
        return names, sums[0] if len(sums) == 1 else torch.stack(sums).sum(dim=0)

    def _run_micro_batch(
        self, micro_batch: Batch, epoch: int | Tensor, weight: float, last: bool
    ) -> tuple[Names, Tensor]:
        """`_run_micro_batches` for one of them."""
        if self.teacher_cache is not None:
            self.teacher_cache.look_up(micro_batch["index"])
        dtype = self.autocast_dtype
        with averaging(self.module, now=last):
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                logits, losses = self.module(**micro_batch, epoch=epoch)
            if not self._gradients_checked:
                check_losses(self.distiller, losses.values())
            total = self.update.backward(losses, weight)
        target = micro_batch["target"]
        hits = correct_counts(logits.detach(), target).double() * 100
        values = [loss.detach().mean() if loss.ndim else loss.detach() for loss in losses.values()]
        return tuple(losses), torch.cat([hits, torch.stack([total, *values]).double() * len(target)])


def split_batch(batch: Batch, parts: int, full: int = 0) -> list[Batch]:
    """Split a batch into micro-batches of about equal size: `parts` or fewer, the last one smaller or larger.

    None is a single image, on which a BatchNorm behind 1x1 maps cannot train, unless those of a full batch are: a
    single image that is left joins the micro-batch before.

    Args:
        batch: tensors or lists, one entry an image; a field of another length goes whole into every micro-batch.
        full: number of images of a full batch; 0: this batch is one.
    """
    if parts == 1:
        return [batch]
    images = len(batch["target"])
    smallest = 1 if (full or images) <= parts else 2
    size = max(smallest, -(-images // parts))
    starts = list(range(0, images, size))
    if size > 1 and images % size == 1 and len(starts) > 1:
        starts.pop()
    bounds = list(zip(starts, [*starts[1:], images]))
    by_image = {name for name, field in batch.items() if _length(field) == images}
    return [{n: field[start:end] if n in by_image else field for n, field in batch.items()} for start, end in bounds]


def _length(field: Any) -> int:
    """Number of entries; -1 for a number or a tensor ()."""
    return -1 if isinstance(field, Tensor) and not field.ndim else len(field)
