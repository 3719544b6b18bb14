"""The training loop: one Trainer for every method. What differs between trainers is how losses become a step."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from yacs.config import CfgNode as CN

from ..dataset.contrastive import ContrastiveSampler
from ..distillers import Distiller
from ..distributed.ranks import current_ranks
from ..distributed.sync_batchnorm import synchronize_batchnorm
from ..errors import UserError
from ..registry import Registry
from .ema import MeanWeights
from .files.atomic import write_whole
from .files.checkpoint import SaveError, load_state, newest_whole, prune, remove_run, save_checkpoint, strip_module
from .files.run_lock import run_lock
from .logs.logger import Logger, build_logger
from .lr_schedule import adjust_learning_rate, learning_rate
from .meters import Meters
from .nan_watch import FiniteWatch, NonFiniteLossError
from .progress_bar import EpochState, Progress
from .runtime.environment import (
    choose_kernels,
    describe_run,
    peak_memory,
    pick_device,
    random_state,
    seed_everything,
    set_random_state,
)
from .runtime.malloc import keep_freed_memory
from .runtime.signals import Stopped, StopRequest
from .scores import Score, correct_counts, evaluate
from .teacher.fast_teacher import DTYPES, speed_up_teacher
from .update import DotUpdate, SumUpdate

__all__ = ["CRDDOT", "DOT", "BaseTrainer", "CRDTrainer", "NonFiniteLossError", "adjust_learning_rate", "learning_rate"]

FIELDS = ("image", "target", "index", "contrastive_index")


class BaseTrainer:
    """Trains a distiller: epochs of steps, each epoch followed by validation, log lines and checkpoints.

    Under torchrun every process trains on its share of each batch, and the first one writes.

    Args:
        experiment_name: the run's folder below LOG.PREFIX.
        distiller: on any device; it is moved to EXPERIMENT.DEVICE.
        train_loader: batches (image, target, index), or with contrastive_index as a fourth.
        val_loader: batches that begin with (image, target).
        cfg: the whole configuration tree.

    Raises:
        UserError: a SOLVER setting that the method or the number of processes cannot take.
    """

    update_rule: ClassVar[type[SumUpdate]] = SumUpdate

    def __init__(
        self, experiment_name: str, distiller: nn.Module, train_loader: Any, val_loader: Any, cfg: CN
    ) -> None:
        self.cfg = cfg
        self.name = experiment_name
        self.log_path = Path(cfg.LOG.PREFIX) / experiment_name
        self.ranks = current_ranks()
        self.device = pick_device(cfg.EXPERIMENT.DEVICE)
        choose_kernels(cfg.EXPERIMENT.DETERMINISTIC)
        if self.device.type == "cpu":
            keep_freed_memory()
        plain: Any = getattr(distiller, "module", distiller)
        layout = {"memory_format": torch.channels_last} if cfg.SOLVER.CHANNELS_LAST else {}
        self.distiller: Distiller = plain.to(device=self.device, **layout)
        _check_parts(self.distiller, cfg, self.ranks.world)
        if cfg.SOLVER.SYNC_BN and self.ranks.world > 1:
            synchronize_batchnorm(self.distiller, self.device)
        self.train_loader = self._own_share(train_loader)
        self.val_loader = self._own_share(val_loader)
        self.teacher_cache = speed_up_teacher(self.distiller, self.train_loader, cfg)
        self.update = self.update_rule(self.distiller.get_learnable_parameters(), cfg)
        self.optimizer = self.update.optimizer
        self.mean_student = MeanWeights(self.distiller.student, cfg.SOLVER.EMA) if cfg.SOLVER.EMA else None
        self.negatives = self._negatives()
        self.module = self._module()
        self.stop = StopRequest()
        self.watch = FiniteWatch(self.log_path, self.device)
        # Steps without effect (SOLVER.NAN_POLICY skip): of this epoch, and since the last that had one.
        self.skipped = self.skipped_in_a_row = 0
        self.best_acc: dict[str, float] = {}
        self.last_acc: dict[str, float] = {}
        # Where an interrupted epoch stood; empty at an epoch's end.
        self._interrupted: dict[str, Any] = {}

    def _own_share(self, loader: Any) -> Any:
        """In-memory loaders keep their images on the training device; a custom one may lack either method."""
        if self.ranks.world > 1:
            loader = loader.shard(self.ranks.rank, self.ranks.world)
        return loader.to(self.device) if hasattr(loader, "to") else loader

    def _negatives(self) -> ContrastiveSampler | None:
        """The sampler of contrastive_index, where the method asks for it and the loader does not bring it."""
        if "contrastive_index" not in self.distiller.needs_batch:
            return None
        crd = self.cfg.CRD
        sampler = ContrastiveSampler(self.train_loader.targets, crd.NCE.K, crd.MODE, self.cfg.EXPERIMENT.SEED)
        return sampler.to(self.device)

    def _module(self) -> nn.Module:
        """What a step calls: the distiller, compiled or spread over the ranks where that is asked for."""
        if self.cfg.SOLVER.COMPILE:
            mode = "reduce-overhead" if self.device.type == "cuda" else None  # with CUDA graphs
            self.distiller.forward_train = torch.compile(self.distiller.forward_train, mode=mode)  # type: ignore[method-assign]
        if self.ranks.world == 1 or not self.update.one_backward:
            return self.distiller
        frozen = [f"teacher.{name}" for name in self.distiller.teacher.state_dict()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.distiller, frozen)
        # Every rank keeps BatchNorm's statistics of its own images until `copy_buffers`.
        known = inspect.signature(DistributedDataParallel).parameters
        own_buffers: Any = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
        return DistributedDataParallel(self.distiller, gradient_as_bucket_view=True, **own_buffers)

    def train(self, resume: bool = False) -> None:
        """Train to SOLVER.EPOCHS, from the start or from where `latest` stands: `begin`, then `run`."""
        self.run(self.begin(resume))

    def begin(self, resume: bool = False, overwrite: bool = False) -> int:
        """The first epoch to train: 1, or where `latest` stands. Writes nothing.

        Raises:
            UserError: resuming without a fitting `latest`; or not resuming where there is one, unless `overwrite`.
        """
        if resume:
            return self.resume() + 1
        if (self.log_path / "latest").exists() and not overwrite:
            raise UserError(
                f"{self.log_path} holds a run already; add --resume to go on with it, --overwrite to lose it"
            )
        return 1

    def run(self, first: int) -> None:
        """Train from epoch `first` to SOLVER.EPOCHS.

        Raises:
            UserError: a loss became NaN or infinite (NonFiniteLossError), a checkpoint could not be written, or
                another process has this run.
            Stopped: a signal asked for it; the run can be resumed from this very step.
        """
        if first > self.cfg.SOLVER.EPOCHS:
            self._say(f"{self.log_path} is trained already, to epoch {first - 1} of {self.cfg.SOLVER.EPOCHS}")
            return
        with ExitStack() as stack:
            if self.ranks.first:
                stack.enter_context(run_lock(self.log_path))
                if first == 1 and not self._interrupted:
                    remove_run(self.log_path)
                self._record()
            done = (first - 1) * len(self.train_loader) + self._interrupted.get("step", 0)
            self.logger = (
                build_logger(self.log_path, self.name, self.cfg, first, done) if self.ranks.first else Logger({})
            )
            stack.enter_context(self.stop.listening())
            for epoch in range(first, self.cfg.SOLVER.EPOCHS + 1):
                self.train_epoch(epoch)
        for name, best in self.best_acc.items():
            label = f" ({name} head)" if name else ""
            self._say(f"Best accuracy{label}: {best:.2f}, last epoch: {self.last_acc[name]:.2f}  -> {self.log_path}")

    def train_epoch(self, epoch: int) -> None:
        """One epoch, or the rest of one: its steps, then validation, then the log, then the checkpoints."""
        seed_everything(self.cfg.EXPERIMENT.SEED, epoch, self.ranks.rank)
        if hasattr(self.train_loader, "set_epoch"):
            self.train_loader.set_epoch(epoch)
        at = self._take_up(epoch)
        steps = len(self.train_loader)
        self.distiller.train()
        bar = Progress(epoch, steps, at.step, shown=self.ranks.first)
        for batch in at.clock.around(_batches_from(self.train_loader, at.step)):
            lr = adjust_learning_rate(epoch, self.cfg, self.optimizer, at.step, steps)
            at.step += 1
            due = at.step % self.cfg.LOG.TENSORBOARD_FREQ == 0
            self.train_iter(self.prepare_batch(batch, epoch), epoch, at.meters, at.recent, at.step, measure=due)
            bar.update(lr, at.meters, len(batch[0]) * self.ranks.world)
            if due:
                self.logger.step((epoch - 1) * steps + at.step, {"lr": lr, **at.recent.over(self.ranks).means()})
                at.recent.reset()
            self._pause(at)
        bar.close()
        self.watch.check()
        whole = at.meters.over(self.ranks)
        if not whole.count:
            raise NonFiniteLossError(f"epoch {epoch}: no step had finite losses; try a lower SOLVER.LR")
        means = whole.means()  # waits for the device: the clock stops after it
        at.clock.stop_training()

        scores = self.validate(at)
        self._end_epoch(epoch, scores, _epoch_metrics(means, scores) | at.clock.metrics(steps, whole.count))
        self._stop_if_asked(self.ranks.any(self.stop.signal))

    def _end_epoch(self, epoch: int, scores: dict[str, Score], metrics: dict[str, float]) -> None:
        """Log and save what an epoch came to, and say so."""
        metrics = {"lr": self.optimizer.param_groups[0]["lr"], **metrics, "peak_memory_mib": peak_memory(self.device)}
        if self.teacher_cache is not None:
            metrics["teacher_cache_hits"] = self.teacher_cache.hit_rate()
        if self.cfg.SOLVER.NAN_POLICY == "skip":
            metrics["skipped_steps"], self.skipped = self.skipped, 0
        improved = self._note_best(scores)
        self.logger.epoch(epoch, metrics)
        if epoch == self.cfg.SOLVER.EPOCHS:  # before `latest` says that the run is over
            self.logger.finish(_by_head("best_acc", self.best_acc) | _by_head("last_acc", self.last_acc))
        self.save(epoch, improved)
        self._say(
            f"epoch {epoch}/{self.cfg.SOLVER.EPOCHS}: lr {metrics['lr']:g}, train_acc {metrics['train_acc']:.2f}, "
            f"train_loss {metrics['train_loss']:.4f}, test_acc {metrics['test_acc']:.2f}, "
            f"{metrics['epoch_seconds']:.1f} s, {metrics['images_per_second']:.0f} images/s"
        )

    def prepare_batch(self, batch: Iterable[Tensor], epoch: int) -> dict[str, Tensor]:
        """The loader's tuple as named tensors on the device, with what the method needs beside them."""
        fields = {name: tensor.to(self.device, non_blocking=True) for name, tensor in zip(FIELDS, batch)}
        if not self.cfg.SOLVER.CHANNELS_LAST:
            fields["image"] = fields["image"].contiguous()
        if self.negatives is not None and "contrastive_index" not in fields:
            fields["contrastive_index"] = self.negatives(fields["index"], epoch)
        return fields

    def train_iter(
        self,
        batch: dict[str, Tensor],
        epoch: int,
        meters: Meters,
        recent: Meters | None = None,
        step: int = 0,
        measure: bool = False,
    ) -> None:
        """One step on one batch, without waiting for the device.

        Args:
            meters: takes the step's figures; `recent` too, and the gradients' norm if `measure`d.
            step: of the epoch, from 1; for the message should a loss not be finite.
        """
        parts = self.cfg.SOLVER.ACCUMULATE
        kept = self._buffers() if self.cfg.SOLVER.NAN_POLICY == "skip" else None
        figures: dict[str, Tensor] = {}
        for number, part in enumerate(_split(batch, parts), start=1):
            share = len(part["target"]) / len(batch["target"])
            losses, more = self._part(part, epoch, share, last=number == parts)
            if kept is not None and self._skips(losses, batch, epoch, step, kept):
                return
            if kept is None:
                self.watch.add(epoch, step, losses, part["index"] if "index" in part else part["target"][:0])
            figures = {name: figures[name] + value if figures else value for name, value in more.items()}
        norm = self.update.step(measure)
        if self.mean_student is not None:
            self.mean_student.update(self.distiller.student)
        meters.add(len(batch["target"]), figures)
        if recent is not None:
            recent.add(len(batch["target"]), figures)
            if norm is not None:
                recent.sums["grad_norm"] = norm.double() * recent.count

    def _part(
        self, part: dict[str, Tensor], epoch: int, share: float, last: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Forward and backward of one part of a batch; its losses, and its figures as sums over its images."""
        if self.teacher_cache is not None:
            self.teacher_cache.look_up(part["index"])
        dtype = DTYPES.get(self.cfg.SOLVER.AMP)
        spread = isinstance(self.module, DistributedDataParallel)
        with self.module.no_sync() if spread and not last else nullcontext():  # type: ignore[operator]
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                logits, losses = self.module(**part, epoch=epoch)
            total = self.update.backward(losses, share)
        target = part["target"]
        top1, top5 = correct_counts(logits.detach(), target).unbind()
        figures = {"train_acc": 100 * top1, "train_acc_top5": 100 * top5, "train_loss": total * len(target)}
        return losses, figures | {f"loss/{k}": loss.detach().mean() * len(target) for k, loss in losses.items()}

    def _buffers(self) -> list[Tensor]:
        """Copies of what a bad batch would spoil beside the gradients: BatchNorm's statistics, CRD's banks."""
        return [buffer.clone() for buffer in self.distiller.buffers()]

    def _skips(
        self, losses: dict[str, Tensor], batch: dict[str, Tensor], epoch: int, step: int, kept: list[Tensor]
    ) -> bool:
        """Whether the losses are bad on any rank, and the step is dropped.

        Raises:
            NonFiniteLossError: for the SOLVER.NAN_LIMIT + 1st time in a row.
        """
        values = {name: float(loss.detach().mean()) for name, loss in losses.items()}
        if not self.ranks.any(not all(abs(value) < float("inf") for value in values.values())):
            self.skipped_in_a_row = 0
            return False
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.cfg.SOLVER.NAN_LIMIT:
            raise self.watch.error(epoch, step, values, batch["index"])
        self.update.drop()
        for buffer, before in zip(self.distiller.buffers(), kept):
            buffer.copy_(before)
        self._say(f"warning: epoch {epoch}, iteration {step} is skipped, its losses are {values}")
        return True

    def validate(self, at: EpochState) -> dict[str, Score]:
        """The scores of every head, and of the mean student where there is one."""
        self.ranks.copy_buffers(self.distiller)
        self.distiller.eval()

        def batches() -> Iterator[Any]:
            for batch in self.val_loader:
                # Several ranks have different numbers of batches, and agree to stop only afterwards.
                if self.stop.signal and self.ranks.world == 1:
                    self._save_within(at)
                    self._stop_if_asked(self.stop.signal)
                yield batch

        return evaluate(batches(), self._heads, self.device, self.ranks)

    def _heads(self, image: Tensor) -> dict[str, Tensor]:
        heads = self.distiller.forward_heads(image)
        if self.mean_student is None:
            return heads
        student, self.distiller.student = self.distiller.student, self.mean_student.network
        try:
            first = next(iter(self.distiller.forward_heads(image).values()))
        finally:
            self.distiller.student = student
        return {name or "student": logits for name, logits in heads.items()} | {"ema": first}

    def _note_best(self, scores: dict[str, Score]) -> list[str]:
        """Keep last and best top-1 of every head; returns the heads whose best this is."""
        self.last_acc = {name: score.top1 for name, score in scores.items()}
        improved = [name for name, top1 in self.last_acc.items() if top1 >= self.best_acc.get(name, 0.0)]
        self.best_acc |= {name: self.last_acc[name] for name in improved}
        return improved

    def save(self, epoch: int, improved: list[str]) -> None:
        """Write `best` where a head got better, every SAVE_CHECKPOINT_FREQ epochs `epoch_N`, and `latest` at last.

        So a run that is killed in between goes on from the `latest` before, and writes the others again.
        """
        first, *others = self.last_acc
        files = {f"student_best_{name}": self._student_state(name) for name in set(others) & set(improved)}
        if first in improved:
            files |= {"student_best": self._student_state(), "best": self._state(epoch)}
        if epoch % self.cfg.LOG.SAVE_CHECKPOINT_FREQ == 0:
            files |= {f"student_{epoch}": self._student_state(), f"epoch_{epoch}": self._state(epoch)}
        if self.mean_student is not None:
            files["student_latest_ema"] = self._student_state("ema")
        self._write(files | {"student_latest": self._student_state(), "latest": self._state(epoch)})

    def _pause(self, at: EpochState) -> None:
        """After a step: write `latest` where that is due, and stop where that is asked for."""
        every = self.cfg.LOG.SAVE_CHECKPOINT_ITERS
        # Asked once: a signal that comes while this is under way is for the next step, on every rank alike.
        signal = self.ranks.any(self.stop.signal)
        if signal or (every and at.step % every == 0):
            self._save_within(at)
        self._stop_if_asked(signal)

    def _save_within(self, at: EpochState) -> None:
        """Write `latest` as it is within an epoch."""
        self.watch.check()
        position = {
            **at.state_dict(self.ranks),
            "random": self.ranks.gather(random_state()),
            "skipped": [self.skipped, self.skipped_in_a_row],
        }
        self._write({"latest": self._state(at.epoch - 1) | {"within_epoch": position}})

    def _stop_if_asked(self, signal: int) -> None:
        if signal:
            self._say(f"stopped by signal {signal}; the same command with --resume goes on from here")
            raise Stopped(signal)

    def _student_state(self, head: str = "") -> dict[str, Any]:
        mean = head == "ema" and self.mean_student is not None
        student = self.mean_student.network if mean else self.distiller.student  # type: ignore[union-attr]
        return {"model": student.state_dict()}

    def _state(self, epoch: int) -> dict[str, Any]:
        """All that resuming needs at the end of `epoch`; the original's keys, and more."""
        state = {
            "epoch": epoch,
            "model": self.distiller.state_dict(),
            **self.update.state_dict(),
            "best_acc": next(iter(self.best_acc.values()), 0.0),
            "head_best_acc": self.best_acc,
            "head_last_acc": self.last_acc,
        }
        if self.mean_student is not None:
            state["ema"] = {"updates": self.mean_student.updates, "model": self.mean_student.network.state_dict()}
        return state

    def _write(self, files: Mapping[str, Any]) -> None:
        """Write checkpoints, in order, from the first rank; the others wait.

        Raises:
            NonFiniteLossError: a weight is not finite.
            SaveError: one could not be written, and LOG.SAVE_ERROR says stop.
        """
        norms = torch.stack(torch._foreach_norm([p.detach() for p in self.distiller.student.parameters()]))
        if not norms.isfinite().all():
            raise NonFiniteLossError(
                f"the student's weights are not finite; nothing was written over the checkpoints in {self.log_path}; "
                "try a lower SOLVER.LR or SOLVER.CLIP_GRAD_NORM"
            )
        if self.ranks.first:
            try:
                for name, content in files.items():
                    save_checkpoint(content, self.log_path / name, keep_previous=name == "latest")
                prune(self.log_path, self.cfg.LOG.KEEP_CHECKPOINTS)
            except SaveError as error:
                if self.cfg.LOG.SAVE_ERROR == "stop":
                    raise
                self._say(f"warning: {error}; training goes on to the next save")
        self.ranks.wait()

    def resume(self) -> int:
        """Take up the state of `latest`, or of the newest whole checkpoint; returns the number of whole epochs in it.

        Raises:
            UserError: there is none, or it belongs to another method or network.
        """
        state, path, damaged = newest_whole(self.log_path)
        for line in damaged:
            self._say(f"warning: {line}; going on from {path}")
        try:
            self._restore(state, path)
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise UserError(f"{path} does not fit this run ({reason})") from None
        return int(state["epoch"])

    def _restore(self, state: dict[str, Any], path: Path) -> None:
        """Take up a checkpoint's content, of which only `load_resumable`'s checks are sure."""
        load_state(self.distiller, strip_module(state["model"]), path)
        try:
            self.update.load_state_dict(state)
        except (ValueError, KeyError) as error:
            raise UserError(f"{path}: its optimizer state does not fit this run ({error})") from None
        if self.mean_student is not None:
            if "ema" not in state:
                raise UserError(f"{path} has no mean of the student's weights; resume it with SOLVER.EMA 0")
            load_state(self.mean_student.network, state["ema"]["model"], path)
            self.mean_student.updates = state["ema"]["updates"]
        # The teacher's weights are the checkpoint's now.
        self.teacher_cache = speed_up_teacher(self.distiller, self.train_loader, self.cfg)
        # The original keeps one number, for the one head that it knows.
        self.best_acc = dict(state.get("head_best_acc", {"": float(state["best_acc"])}))
        self.last_acc = dict(state.get("head_last_acc", self.best_acc))
        self._interrupted = state.get("within_epoch", {})
        self._take_up(1)  # to see whether that can be done
        self._interrupted = state.get("within_epoch", {})

    def _take_up(self, epoch: int) -> EpochState:
        """The state of the epoch that begins, or that was interrupted."""
        state, self._interrupted = self._interrupted, {}
        at = EpochState(epoch)
        if state:
            at.load_state_dict(state, self.ranks, self.device)
            self.skipped, self.skipped_in_a_row = state["skipped"]
            if len(state["random"]) == self.ranks.world:
                set_random_state(state["random"][self.ranks.rank])
        return at

    def _record(self) -> None:
        """Write beside the log, before training, what it takes to repeat this run.

        Raises:
            SaveError: it cannot be written.
        """
        write_whole(self.cfg.dump().encode(), self.log_path / "config.yaml")
        facts = {"seed": self.cfg.EXPERIMENT.SEED, "device": str(self.device), "processes": self.ranks.world}
        record = json.dumps({**facts, **describe_run()}, indent=2)
        write_whole(f"{record}\n".encode(), self.log_path / "environment.json")

    def _say(self, line: str) -> None:
        if self.ranks.first:
            print(line, flush=True)


class CRDTrainer(BaseTrainer):
    """The original's name for a trainer whose batches carry negatives; every trainer here draws them when asked."""


class DOT(BaseTrainer):
    """Distillation-oriented training: task and distillation gradients with their own momenta. arXiv 2307.08436."""

    update_rule = DotUpdate


class CRDDOT(DOT):
    """DOT for CRD."""


trainer_dict = Registry("trainer", {"base": BaseTrainer, "crd": CRDTrainer, "dot": DOT, "crd_dot": CRDDOT})


def _check_parts(distiller: Distiller, cfg: CN, world: int) -> None:
    """Refuse a batch that cannot be divided among the ranks, or in parts, as the configuration asks."""
    batch, parts = cfg.SOLVER.BATCH_SIZE, cfg.SOLVER.ACCUMULATE
    if batch % world:
        raise UserError(f"SOLVER.BATCH_SIZE {batch} cannot be shared evenly by {world} processes; take a multiple")
    if parts > batch // world:
        raise UserError(f"SOLVER.ACCUMULATE {parts} is more than the {batch // world} images of a batch")
    if parts > 1 and distiller.compares_images:
        raise UserError(
            f"SOLVER.ACCUMULATE {parts}: {type(distiller).__name__} compares the images of a batch with each other, so "
            "that parts of it give another loss; set it to 1"
        )


def _split(batch: dict[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    """A batch in about equal parts."""
    if parts == 1:
        return [batch]
    pieces = {name: tensor.chunk(parts) for name, tensor in batch.items()}
    return [dict(zip(pieces, values)) for values in zip(*pieces.values())]


def _batches_from(loader: Any, start: int) -> Iterator[Any]:
    """The rest of an epoch, from batch number `start` (from 0) on."""
    return loader.iter_from(start) if hasattr(loader, "iter_from") else islice(loader, start, None)


def _by_head(name: str, values: Mapping[str, float]) -> dict[str, float]:
    """A figure of the first head under `name`, and where there are several that of each under `name_head_<head>`."""
    named = {name: next(iter(values.values()))}
    if len(values) > 1:
        named |= {f"{name}_head_{head}": value for head, value in values.items()}
    return named


def _epoch_metrics(means: dict[str, float], scores: dict[str, Score]) -> dict[str, float]:
    """Training means and validation scores under the original's names."""
    first = next(iter(scores.values()))
    metrics = {
        "train_acc": means["train_acc"],
        "train_loss": means["train_loss"],
        **_by_head("test_acc", {name: score.top1 for name, score in scores.items()}),
        "test_acc_top5": first.top5,
        "test_loss": first.loss,
    }
    return metrics | {name: mean for name, mean in means.items() if name not in metrics}
