"""The training loop: one Trainer for every method. Trainers differ only in their update rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor
from torch.optim import Optimizer
from yacs.config import CfgNode as CN

from ..console import PROGRESS, log_to_terminal, progress
from ..dataset import Loader, check_class_names
from ..dataset.batch import fields_of, named_batch
from ..dataset.worker_failures import WorkerError
from ..dataset.workers import started
from ..distillers import Distiller, logits_of
from ..distillers.contract import check_distiller, learnable_parameters
from ..distributed.ranks import current_ranks
from ..errors import UserError
from ..registry import Registry
from .batches import BatchReader, batches_from, calling
from .ema import EMA
from .epoch_state import EpochState
from .files.run_folder import check_no_run, remove_run
from .files.run_lock import run_lock
from .first_step import FirstStep
from .graphed_step import GraphedStep, recorder_for
from .logs.logger import Logger, build_logger
from .lr_schedule import adjust_learning_rate, learning_rate
from .meters import Meters
from .modes import GRAPH, Setup, check_modes, obstacle
from .nan_watch import NonFiniteLossError, nan_policy_dict
from .overridden import OwnStep, adopt_optimizer, adopt_overrides, check_knows_stages
from .parts import Parts
from .phases import Phase, Phases
from .placing import counted, own_share, placed
from .progress_bar import ProgressBar
from .resume import RunState
from .resume_facts import facts_of_run
from .runtime.device import check_compiler, choose_kernels, peak_memory, pick_device
from .runtime.environment import record_run
from .runtime.malloc import keep_freed_memory
from .runtime.signals import Stopped, StopRequest
from .scores import Measure, Score, by_head, epoch_metrics, evaluate, score_teacher
from .single_images import check_single_images
from .split_update import AlignedUpdate, DeepKDUpdate, DotUpdate
from .step import Step
from .teacher.fast_teacher import FrozenNetworks
from .update import SumUpdate


class BaseTrainer:
    """Trains a distiller: epochs of steps, each epoch followed by validation, log lines and checkpoints.

    The loop is here; `Step` trains on one batch, `RunState` saves and restores. Under torchrun every process trains on
    its share of each batch, and the first one writes the files.

    Args:
        experiment_name: the run's folder under LOG.PREFIX.
        distiller: on any device; it is moved to EXPERIMENT.DEVICE.
        train_loader: batches (image, target, index); its attribute `fields` names others, or it yields dictionaries.
        val_loader: batches (image, target), likewise.
        cfg: the whole configuration tree.

    Attributes:
        best_acc: the best top-1 of the main head so far, in percent; in `log`, that of the epochs before. A subclass
            may set it, as in the original; the checkpoints follow the record in `state.scores`.
        overwrite: whether `train` may replace a run that is in the folder.
        when_begun: called by `train` once it is known where to begin, before anything is written.

    Raises:
        UserError: the method breaks its contract (`distillers.contract`), needs a field that no batch has, does not
            support a SOLVER setting, or cannot train on the single images that the settings give it.
    """

    update_rule: ClassVar[type[SumUpdate]] = SumUpdate

    def __init__(self, experiment_name: str, distiller: nn.Module, train_loader: Any, val_loader: Any, cfg: CN) -> None:
        self.cfg = cfg
        self.name = experiment_name
        self.log_path = Path(cfg.LOG.PREFIX) / experiment_name
        self.ranks = current_ranks()
        adopt_overrides(self, BaseTrainer)
        self.device = pick_device(cfg.EXPERIMENT.DEVICE)
        choose_kernels(cfg.EXPERIMENT.DETERMINISTIC)
        if cfg.SOLVER.COMPILE:
            check_compiler(self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        plain: Any = getattr(distiller, "module", distiller)
        check_distiller(plain)
        check_class_names(train_loader, val_loader)
        check_modes(cfg, plain, self.update_rule, self.ranks.world, train_loader)
        plain.smooth_labels(cfg.SOLVER.LABEL_SMOOTHING)
        self.update_rule.prepare(plain, cfg)
        self.distiller: Distiller = placed(plain, self.device, self.ranks, cfg)
        self.train_loader, self.val_loader = (
            own_share(loader, self.device, self.ranks) for loader in (counted(train_loader), val_loader)
        )
        self.measure = Measure.of(self.train_loader, self.val_loader)
        if not self.measure.labelled:
            self.distiller.train_without_labels()
        self.prepare_batch = BatchReader(self.distiller, self.train_loader, self.device, cfg)
        if isinstance(self.train_loader, Loader):
            check_single_images(self.distiller, self.prepare_batch, cfg, self.ranks)
        self.update = self.update_rule(learnable_parameters(self.distiller), cfg)
        adopt_optimizer(self, self.init_optimizer(cfg), "init_optimizer must return")
        self.ema = EMA(self.distiller.main_network(), cfg.SOLVER.EMA) if cfg.SOLVER.EMA else None
        policy = nan_policy_dict[cfg.SOLVER.NAN_POLICY]
        self.nan_policy = policy(self.log_path, self.distiller, self.device, self.ranks, cfg)
        against = obstacle(GRAPH, Setup(cfg, self.distiller, self.update_rule, self.ranks.world, train_loader))
        if isinstance(self.train_iter, OwnStep):
            against = against or f"{type(self).__name__}.train_iter takes the steps"
        self._recorder = recorder_for(self.device, cfg, against)
        self.take_step = self._taken_by(self.update, cfg, self.ema)
        self.step = self.take_step.step
        self.step.frozen = FrozenNetworks(self.distiller, self.train_loader, cfg)
        training = Phase(0, cfg.SOLVER.EPOCHS, cfg, self.take_step)
        self.phases = Phases(self.distiller, training, partial(self._taken_by, ema=None))
        if self.phases.stages:
            check_knows_stages(self)
        self.state = RunState(
            self.log_path, self.distiller, self.update, self.ema, self.nan_policy, self.device, self.ranks, cfg,
            facts_of_run(cfg, self.distiller, self.update, self.train_loader, self.ranks), self.train_loader,
        )  # fmt: skip
        self.state.phases = self.phases
        self.best_acc = -1.0
        self.overwrite = self._replace = False
        self.first_step = FirstStep(
            Parts(self.distiller, self.train_loader, self.val_loader, self.ranks, cfg), self.prepare_batch
        )
        self.when_begun: Callable[[], None] = lambda: None
        self.stop = StopRequest()
        self._agreed_stop = self.ranks.late_maximum()

    def _taken_by(self, update: SumUpdate, cfg: CN, ema: EMA | None) -> GraphedStep:
        """What takes the steps of an update rule."""
        in_graph = self._recorder is not None and not update.host_reads()
        step = Step(self.distiller, update, self.nan_policy, ema, None, self.device, self.ranks, cfg, in_graph)
        return GraphedStep(step, self._recorder, required=cfg.SOLVER.CUDA_GRAPH == "always")

    def _turn_to(self, epoch: int) -> Phase:
        """The phase of an epoch, whose steps are taken from now on."""
        phase = self.phases.turn_to(epoch)
        self.take_step, self.step, self.state.parts["optimizer"] = phase.take_step, phase.step, phase.update
        return phase

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer, which takes the steps, follows the schedule and is saved; a subclass may set another one."""
        return self.update.optimizer

    @optimizer.setter
    def optimizer(self, own: Optimizer) -> None:
        adopt_optimizer(self, own, "optimizer must be")

    def init_optimizer(self, cfg: CN) -> Optimizer:
        """The optimizer; a subclass may return its own. `self.distiller` is there."""
        return self.update.optimizer

    def log(self, lr: float, epoch: int, log_dict: Mapping[str, float]) -> None:
        """Log an epoch's metrics, on the first rank; a subclass may do more, or log other metrics."""
        self.logger.epoch(epoch, {"lr": lr, **log_dict})

    def train(self, resume: bool = False) -> None:
        """Train the method's stages and to SOLVER.EPOCHS, from the start or from `latest`: `begin`, then `run`.

        As in the original, its progress is seen: on the terminal, unless the log has a handler already. `mdistiller
        train` calls it too, so that a subclass may do more around it.
        """
        if not PROGRESS.hasHandlers():
            log_to_terminal()
        first = self.begin(resume, self.overwrite)
        self.when_begun()
        self.run(first)

    def begin(self, resume: bool = False, overwrite: bool = False) -> int:
        """The first epoch to train: 1, or with `resume` the one where the run stopped. Writes nothing.

        The epochs of stages before training are numbered up to 0, see `phases`.

        Raises:
            UserError: with `resume`, there is no checkpoint or it does not fit; without it, the folder already holds a
                run's checkpoint, and `overwrite` is not set.
        """
        self._replace = overwrite and not resume
        if resume:
            done = self.state.restore()
            self.best_acc = next(iter(self.state.best_acc.values()), -1.0)
            self._turn_to(done + 1)
            # The teacher now has the checkpoint's weights.
            self.step.frozen = None  # whose cache is freed before there is a new one
            self.step.frozen = FrozenNetworks(self.distiller, self.train_loader, self.cfg)
            return done + 1
        if not overwrite:
            check_no_run(self.log_path)
        return self.phases.first

    def run(self, first: int) -> None:
        """Train from epoch `first`, which `begin` returns, to SOLVER.EPOCHS.

        Raises:
            UserError: a loss became NaN or infinite (NonFiniteLossError), a checkpoint could not be written, or
                another process is training in this folder.
            WorkerError: a loader's worker failed. A single process has saved `latest` at its last step.
            Stopped: a signal asked for it; the run can be resumed from this step.
        """
        if first > self.cfg.SOLVER.EPOCHS:
            epochs = self.cfg.SOLVER.EPOCHS
            of = f" of {epochs}" if first - 1 == epochs else f", and SOLVER.EPOCHS is {epochs}"
            self._say(f"{self.log_path} is trained already, to epoch {first - 1}{of}")
            return
        with ExitStack() as stack:
            self.logger = Logger({})
            if self.ranks.first:
                stack.enter_context(run_lock(self.log_path))
                done = (first - 1) * len(self.train_loader) + self.state.position.step
                self.first_step.open_files = partial(self._open, first, done)
            stack.enter_context(self.stop.listening())
            try:
                if first == self.phases.first and not self.state.interrupted:
                    self._score_teacher()
                for epoch in range(first, self.cfg.SOLVER.EPOCHS + 1):
                    with self.phases.naming(epoch):
                        self.train_epoch(epoch)
            except WorkerError as error:
                raise self._saved_after(error) from None
        for name, best in self.state.best_acc.items():
            label = f" ({name} head)" if name else ""
            last = self.state.last_acc[name]
            self._say(f"Best {self.measure.name}{label}: {best:.2f}, last epoch: {last:.2f}  -> {self.log_path}")

    def _score_teacher(self) -> None:
        """With DISTILLER.SCORE_TEACHER: say how accurate the teacher is. No epoch's draws depend on it."""
        if self.cfg.DISTILLER.SCORE_TEACHER and self.distiller.needs_teacher:
            self.distiller.eval()
            self._say(score_teacher(self.val_loader, self.distiller.teacher, self.device, self.ranks))

    def _open(self, first: int, done: int) -> None:
        """Begin the run's files, or go on with them, after `done` steps. A former run stands until then."""
        if self._replace:
            remove_run(self.log_path)
        record_run(self.log_path, self.cfg, device=str(self.device), processes=self.ranks.world)
        resumed = first > self.phases.first or bool(self.state.position.step)
        self.logger = build_logger(self.log_path, self.name, self.cfg, first, done, resumed)

    def train_epoch(self, epoch: int) -> None:
        """One epoch, or the rest of one: its steps, then validation, then the log, then the checkpoints.

        Without validation in a stage before training, in which the student's classifier does not learn.
        """
        phase = self._turn_to(epoch)
        at, own = self.state.take_up(epoch), phase.own(epoch)
        if self.ema is not None and self.phases.stages and epoch == 1 and not at.step:
            self.ema.begin(self.distiller.main_network())
        if hasattr(self.train_loader, "set_epoch"):
            self.train_loader.set_epoch(own)
        steps = len(self.train_loader)
        self.distiller.train()
        self.step.begin_epoch()
        bar = ProgressBar(phase.words(epoch), steps, at.step, shown=self.ranks.first)
        batches = batches_from(self.train_loader, at.step)
        self.state.take_up_draws()
        for batch in at.clock.around(batches):
            lr = adjust_learning_rate(own, phase.cfg, phase.update.optimizer, at.step, steps)
            at.step += 1
            log_now = at.step % self.cfg.LOG.TENSORBOARD_FREQ == 0
            fields = self.prepare_batch(batch, own)
            with self.first_step.around(fields, at.clock):
                self.train_iter(fields, own, at.meters, at.recent, at.step, measure=log_now)
            bar.update(lr, at.meters, len(fields["target"]) * self.ranks.world)
            if log_now:
                recent = self._of_steps(at.recent.over(self.ranks).means())
                self.logger.step((epoch - 1) * steps + at.step, {"lr": lr, **recent})
                at.recent.reset()
            self._save_or_stop(at)
        bar.close()
        if not at.step:
            raise UserError(
                f"{phase.words(epoch)}: the training loader yields no batch; let iter() of it begin anew in every "
                "epoch, as a torch DataLoader's does"
            )
        self.first_step.open(at.clock)  # of an epoch that is resumed after its last step
        self.nan_policy.check()
        whole = at.meters.over(self.ranks)
        if not whole.count:
            raise NonFiniteLossError(f"epoch {own}: no step had finite losses; try a lower SOLVER.LR")
        means = whole.means()  # waits for the device: the clock stops after it
        at.clock.stop_training()

        if phase.stage is not None:
            self._end_stage_epoch(phase, epoch, self._of_steps(means) | at.clock.metrics(steps, whole.count))
            return
        self.state.save_within(at)  # so that a run that is stopped within validation loses nothing
        scores = self.validate(at)
        metrics = epoch_metrics(means, scores, self.measure)
        self._end_epoch(epoch, scores, metrics | at.clock.metrics(steps, whole.count))
        self._stop_if_asked(self.ranks.maximum(self.stop.signal))

    def _of_steps(self, means: Mapping[str, float]) -> dict[str, float]:
        """The metrics of steps; without accuracies in a stage, where no classifier is trained."""
        own = self.measure.of_steps(means)
        in_stage = self.phases.now.stage is not None
        return {name: mean for name, mean in own.items() if not (in_stage and name.startswith("train_acc"))}

    def _end_stage_epoch(self, phase: Phase, epoch: int, metrics: dict[str, float]) -> None:
        """Log, save and print the results of an epoch of a stage before training."""
        self.ranks.copy_buffers(self.distiller)
        own, lr, metrics = phase.own(epoch), phase.cfg.SOLVER.LR, self._of_device(metrics)
        if self.ranks.first:
            self.log(lr, epoch, metrics)
        self.state.save_stage(epoch)
        self._say(
            f"{phase.name}, epoch {own}/{phase.epochs}: lr {lr:g}, train_loss {metrics['train_loss']:.4f}, "
            f"{metrics['epoch_seconds']:.1f} s, {metrics['images_per_second']:.0f} images/s"
        )
        # No message of the steps is under way while workers are forked for the next epoch.
        self._stop_if_asked(self.ranks.maximum(max(self.stop.signal, self._agreed_stop.settle())))

    def _of_device(self, metrics: dict[str, float]) -> dict[str, float]:
        """`metrics` and what the device, the teacher cache and the NaN policy tell of an epoch."""
        metrics = {**metrics, "peak_memory_mib": peak_memory(self.device)}
        if self.step.teacher_cache is not None:
            metrics["teacher_cache_hits"] = self.step.teacher_cache.hit_rate()
        if self.nan_policy.skipped is not None:
            metrics["skipped_steps"], self.nan_policy.skipped = self.nan_policy.skipped, 0
        return metrics

    def _end_epoch(self, epoch: int, scores: dict[str, Score], metrics: dict[str, float]) -> None:
        """Log, save and print the results of an epoch."""
        steps = len(self.train_loader)
        lr = learning_rate(epoch, self.cfg, steps - 1, steps)
        metrics = self._of_device(metrics)
        own = self._own_metrics()
        metrics |= {f"method/{name}": value for name, value in own.items()}
        if self.ranks.first:
            self.log(lr, epoch, metrics)
        improved = self.state.scores.note(scores)
        self.best_acc = max(self.best_acc, next(iter(self.state.best_acc.values())))
        if epoch == self.cfg.SOLVER.EPOCHS:  # before `latest` marks the run as finished
            best, last = self.state.best_acc, self.state.last_acc
            key = self.measure.key
            self.logger.finish(by_head(f"best_{key}", best) | by_head(f"last_{key}", last))
        self.state.save(epoch, improved)
        self._say(
            f"epoch {epoch}/{self.cfg.SOLVER.EPOCHS}: lr {lr:g}, {self.measure.epoch_line(metrics)}, "
            f"{''.join(f'{name} {value:.4g}, ' for name, value in own.items())}"
            f"{metrics['epoch_seconds']:.1f} s, {metrics['images_per_second']:.0f} images/s"
        )

    def _own_metrics(self) -> dict[str, float]:
        """The method's own numbers, by name."""
        own = self.distiller.metrics()
        return dict(zip(own, torch.cat([value.reshape(1) for value in own.values()]).tolist())) if own else {}

    def train_iter(
        self,
        batch: dict[str, Tensor],
        epoch: int,
        meters: Meters,
        recent: Meters | None = None,
        step: int = 0,
        measure: bool = False,
    ) -> None:
        """One step on one batch.

        Args:
            meters: the step's metrics are added to it, and to `recent`.
            step: number of the step in its epoch, from 1, for the message if a loss is not finite.
            measure: also add the norm of the gradients to `recent`.
        """
        result = self.take_step(batch, epoch, step, [meters] if recent is None else [meters, recent])
        if result is not None and recent is not None and measure:
            recent.set_mean("grad_norm", result.grad_norm)

    def validate(self, at: EpochState) -> dict[str, Score]:
        """The scores of every head, and of the averaged weights if there is an EMA."""
        self.ranks.copy_buffers(self.distiller)
        if self.ema is not None:
            self.ranks.copy_buffers(self.ema.network)
        self.distiller.eval()
        self._stop_if_asked(self._agreed_stop.settle())  # no message is under way while workers are forked
        # Ranks may have different numbers of batches, but must ask for signals equally often.
        rounds = self.ranks.maximum(len(self.val_loader)) if self.ranks.world > 1 else None
        batches = calling(started(self.val_loader), partial(self._save_or_stop, at, save=False), rounds)
        fields = fields_of(self.val_loader)
        named = (named_batch(batch, fields) for batch in batches)
        return evaluate(named, self._heads, self.device, self.ranks, self._teacher if self.measure.unlabelled else None)

    def _teacher(self, image: Tensor) -> Tensor:
        return logits_of(self.distiller.teacher(image))

    def _heads(self, image: Tensor) -> dict[str, Tensor]:
        heads = self.distiller.forward_heads(image)
        if self.ema is None:
            return heads
        averaged = self.ema.logits(self.distiller, image)
        return {name or "student": logits for name, logits in heads.items()} | {"ema": averaged}

    def _save_or_stop(self, at: EpochState, save: bool = True) -> None:
        """After a step or a batch of validation: stop if a signal asked for it; if `save`, write `latest` if it is due.

        On several ranks it is the signals of the call before, so that no rank waits for another here, and all of them
        stop after the same step.
        """
        signal = self._agreed_stop(self.stop.signal)
        every = self.cfg.LOG.SAVE_CHECKPOINT_ITERS
        if signal or (save and every and at.step % every == 0):
            self.state.save_within(at)
        self._stop_if_asked(signal)

    def _stop_if_asked(self, signal: int) -> None:
        if signal:
            self._say(f"stopped by signal {signal}; {self.state.continuation()}")
            raise Stopped(signal)

    def _saved_after(self, error: WorkerError) -> WorkerError:
        """`error`, with where to go on. A single process saves first; of several, the others would not take part."""
        if self.ranks.world == 1 and self.state.position.step:
            self.state.save_within(self.state.position)
        where = self.state.last_saved
        return WorkerError(f"{error}; the same command with --resume goes on after {where}") if where else error

    def _say(self, line: str) -> None:
        if self.ranks.first:
            progress(line)


class CRDTrainer(BaseTrainer):
    """The original's name for the trainer that draws negatives; now every trainer does if the method needs them."""


class DOT(BaseTrainer):
    """Distillation-oriented training: separate momenta for task and distillation gradients. arXiv 2307.08436."""

    update_rule = DotUpdate


class CRDDOT(DOT):
    """DOT for CRD."""


class DeepKD(BaseTrainer):
    """Three momenta: of the task's gradient, of the target part's and of the other classes'. arXiv 2505.15133."""

    update_rule = DeepKDUpdate


class Aligned(BaseTrainer):
    """The distillation gradient loses what points against the task gradient. arXiv 2411.08937."""

    update_rule = AlignedUpdate


trainer_dict = Registry(
    "trainer",
    {
        "base": BaseTrainer, "crd": CRDTrainer, "dot": DOT, "crd_dot": CRDDOT, "deepkd": DeepKD, "aligned": Aligned,
    },
)  # fmt: skip
