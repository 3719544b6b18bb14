"""The training loop: one Trainer for every method. What differs between trainers is how losses become a step."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm
from yacs.config import CfgNode as CN

from ..dataset.contrastive import ContrastiveSampler
from ..distillers import Distiller
from ..errors import UserError
from ..registry import Registry
from .checkpoint import load_checkpoint, load_state, save_checkpoint, strip_module
from .evaluate import Score, correct_counts, evaluate_distiller
from .logger import build_logger
from .meters import Meters
from .runtime import describe_run, peak_memory, pick_device, seed_everything
from .update import DotUpdate, SumUpdate

FIELDS = ("image", "target", "index", "contrastive_index")


def learning_rate(epoch: int, cfg: CN) -> float:
    """The original's steps: LR times LR_DECAY_RATE for every stage that `epoch` (from 1) has passed."""
    return cfg.SOLVER.LR * cfg.SOLVER.LR_DECAY_RATE ** sum(epoch > stage for stage in cfg.SOLVER.LR_DECAY_STAGES)


def adjust_learning_rate(epoch: int, cfg: CN, optimizer: torch.optim.Optimizer) -> float:
    """Set and return the `learning_rate` of `epoch` (from 1)."""
    lr = learning_rate(epoch, cfg)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


class NonFiniteLossError(UserError):
    """A loss became NaN or infinite; names the epoch and the parts."""


class BaseTrainer:
    """Trains a distiller: epochs of steps, each epoch followed by validation, log lines and checkpoints.

    Args:
        experiment_name: the run's folder below LOG.PREFIX.
        distiller: on any device; it is moved to EXPERIMENT.DEVICE.
        train_loader: batches (image, target, index), or with contrastive_index as a fourth.
        val_loader: batches that begin with (image, target).
        cfg: the whole configuration tree.
    """

    update_rule: ClassVar[type] = SumUpdate

    def __init__(
        self, experiment_name: str, distiller: nn.Module, train_loader: Any, val_loader: Any, cfg: CN
    ) -> None:
        self.cfg = cfg
        self.name = experiment_name
        self.log_path = Path(cfg.LOG.PREFIX) / experiment_name
        self.device = pick_device(cfg.EXPERIMENT.DEVICE)
        plain: Any = getattr(distiller, "module", distiller)
        self.distiller: Distiller = plain.to(device=self.device, memory_format=torch.channels_last)
        self.train_loader = _on_device(train_loader, self.device)
        self.val_loader = _on_device(val_loader, self.device)
        self.update = self.update_rule(self.distiller.get_learnable_parameters(), cfg)
        self.optimizer = self.update.optimizer
        self.negatives = self._negatives()
        self.best_acc: dict[str, float] = {}
        self.last_acc: dict[str, float] = {}

    def _negatives(self) -> ContrastiveSampler | None:
        """The sampler of contrastive_index, where the method asks for it and the loader does not bring it."""
        if "contrastive_index" not in self.distiller.needs_batch:
            return None
        crd = self.cfg.CRD
        sampler = ContrastiveSampler(self.train_loader.targets, crd.NCE.K, crd.MODE, self.cfg.EXPERIMENT.SEED)
        return sampler.to(self.device)

    def train(self, resume: bool = False) -> None:
        """Train to SOLVER.EPOCHS, from the start or from where `latest` stands: `begin`, then `run`."""
        self.run(self.begin(resume))

    def begin(self, resume: bool = False, overwrite: bool = False) -> int:
        """The first epoch to train: 1, or the one after `latest`. Writes nothing.

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
            NonFiniteLossError: a loss became NaN or infinite.
        """
        if first > self.cfg.SOLVER.EPOCHS:
            print(f"{self.log_path} is trained already, to epoch {first - 1} of {self.cfg.SOLVER.EPOCHS}")
            return
        self.log_path.mkdir(parents=True, exist_ok=True)
        self._record()
        self.logger = build_logger(self.log_path, self.name, self.cfg, first)
        for epoch in range(first, self.cfg.SOLVER.EPOCHS + 1):
            self.train_epoch(epoch)
        self.logger.finish(_by_head("best_acc", self.best_acc) | _by_head("last_acc", self.last_acc))
        for name, best in self.best_acc.items():
            label = f" ({name} head)" if name else ""
            print(f"Best accuracy{label}: {best:.2f}, last epoch: {self.last_acc[name]:.2f}  -> {self.log_path}")

    def train_epoch(self, epoch: int) -> None:
        """One epoch: its steps, then validation, then the log, then the checkpoints."""
        seed_everything(self.cfg.EXPERIMENT.SEED, epoch)
        lr = adjust_learning_rate(epoch, self.cfg, self.optimizer)
        if hasattr(self.train_loader, "set_epoch"):
            self.train_loader.set_epoch(epoch)
        self.distiller.train()

        meters, clock = Meters(), _Clock()
        steps = len(self.train_loader)
        with tqdm(total=steps, disable=not sys.stderr.isatty(), desc=f"epoch {epoch}", leave=False) as bar:
            for step, batch in enumerate(clock.around(self.train_loader), start=1):
                self.train_iter(self.prepare_batch(batch, epoch), epoch, meters)
                bar.update()
                if step % self.cfg.LOG.TENSORBOARD_FREQ == 0:
                    self.logger.step((epoch - 1) * steps + step, {"lr": lr, **meters.means()})
        means = meters.means()  # waits for the device: the clock stops after it
        clock.stop_training()
        _require_finite(means, epoch)

        scores = evaluate_distiller(self.val_loader, self.distiller)
        metrics = {"lr": lr, **_epoch_metrics(means, scores), **clock.metrics(steps, meters.count)}
        metrics["peak_memory_mib"] = peak_memory(self.device)
        improved = self._note_best(scores)
        self.logger.epoch(epoch, metrics)
        self.save(epoch, improved)
        print(
            f"epoch {epoch}/{self.cfg.SOLVER.EPOCHS}: lr {lr:g}, train_acc {metrics['train_acc']:.2f}, "
            f"train_loss {metrics['train_loss']:.4f}, test_acc {metrics['test_acc']:.2f}, "
            f"{metrics['epoch_seconds']:.1f} s, {metrics['images_per_second']:.0f} images/s",
            flush=True,
        )

    def prepare_batch(self, batch: Iterable[Tensor], epoch: int) -> dict[str, Tensor]:
        """The loader's tuple as named tensors on the device, with what the method needs beside them."""
        fields = {name: tensor.to(self.device, non_blocking=True) for name, tensor in zip(FIELDS, batch)}
        if self.negatives is not None and "contrastive_index" not in fields:
            fields["contrastive_index"] = self.negatives(fields["index"], epoch)
        return fields

    def train_iter(self, batch: dict[str, Tensor], epoch: int, meters: Meters) -> None:
        """One step on one batch; its figures go to `meters`, without waiting for the device."""
        logits, losses = self.distiller(**batch, epoch=epoch)
        total = self.update(losses)
        target = batch["target"]
        top1, top5 = correct_counts(logits.detach(), target).unbind()
        parts = {f"loss/{name}": loss.detach().mean() * len(target) for name, loss in losses.items()}
        meters.add(
            len(target),
            {"train_acc": 100 * top1, "train_acc_top5": 100 * top5, "train_loss": total * len(target), **parts},
        )

    def _note_best(self, scores: dict[str, Score]) -> list[str]:
        """Keep last and best top-1 of every head; returns the heads whose best this is."""
        self.last_acc = {name: score.top1 for name, score in scores.items()}
        improved = [name for name, top1 in self.last_acc.items() if top1 >= self.best_acc.get(name, 0.0)]
        self.best_acc |= {name: self.last_acc[name] for name in improved}
        return improved

    def save(self, epoch: int, improved: list[str]) -> None:
        """Write `latest`, every SAVE_CHECKPOINT_FREQ epochs `epoch_N`, and `best` where a head got better."""
        first, *others = self.last_acc
        state = {
            "epoch": epoch,
            "model": self.distiller.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best_acc": self.best_acc[first],
            "head_best_acc": self.best_acc,
            "head_last_acc": self.last_acc,
        }
        student = {"model": self.distiller.student.state_dict()}
        names = [("latest", "student_latest")]
        if epoch % self.cfg.LOG.SAVE_CHECKPOINT_FREQ == 0:
            names.append((f"epoch_{epoch}", f"student_{epoch}"))
        if first in improved:
            names.append(("best", "student_best"))
        for whole, student_alone in names:
            save_checkpoint(student, self.log_path / student_alone)
            save_checkpoint(state, self.log_path / whole)
        for name in set(others) & set(improved):
            save_checkpoint(student, self.log_path / f"student_best_{name}")

    def resume(self) -> int:
        """Take up the state of `latest`; returns the epoch it ended.

        Raises:
            UserError: there is none, or it belongs to another method or network.
        """
        path = self.log_path / "latest"
        state = load_checkpoint(path)
        if not isinstance(state, dict) or not {"epoch", "model", "optimizer", "best_acc"} <= state.keys():
            raise UserError(f"{path} is no run's checkpoint: it must hold epoch, model, optimizer and best_acc")
        load_state(self.distiller, strip_module(state["model"]), path)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except (ValueError, KeyError) as error:
            raise UserError(f"{path}: its optimizer state does not fit this run ({error})") from None
        # The original keeps one number, for the one head that it knows.
        self.best_acc = dict(state.get("head_best_acc", {"": float(state["best_acc"])}))
        self.last_acc = dict(state.get("head_last_acc", self.best_acc))
        return int(state["epoch"])

    def _record(self) -> None:
        """Write beside the log, before training, what it takes to repeat this run."""
        (self.log_path / "config.yaml").write_text(self.cfg.dump(), encoding="utf-8")
        record = {"seed": self.cfg.EXPERIMENT.SEED, "device": str(self.device), **describe_run()}
        (self.log_path / "environment.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


class CRDTrainer(BaseTrainer):
    """The original's name for a trainer whose batches carry negatives; every trainer here draws them when asked."""


class DOT(BaseTrainer):
    """Distillation-oriented training: task and distillation gradients with their own momenta. arXiv 2304.08827."""

    update_rule = DotUpdate


class CRDDOT(DOT):
    """DOT for CRD."""


trainer_dict = Registry("trainer", {"base": BaseTrainer, "crd": CRDTrainer, "dot": DOT, "crd_dot": CRDDOT})


class _Clock:
    """Seconds of one epoch: waiting for data, training, and in all."""

    def __init__(self) -> None:
        self.data = self.training = 0.0
        self.start = time.perf_counter()

    def around(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The batches of `loader`, with the time to each `next()` counted as data time."""
        batches = iter(loader)
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            self.data += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    def stop_training(self) -> None:
        self.training = time.perf_counter() - self.start

    def metrics(self, steps: int, images: int) -> dict[str, float]:
        """Seconds a step (of them, for data), images a second while training, seconds of the epoch up to now."""
        return {
            "data_time": self.data / steps,
            "step_time": self.training / steps,
            "images_per_second": images / self.training,
            "epoch_seconds": time.perf_counter() - self.start,
        }


def _on_device(loader: Any, device: torch.device) -> Any:
    """In-memory loaders keep their images on the training device; others have no `to`."""
    return loader.to(device) if hasattr(loader, "to") else loader


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


def _require_finite(means: dict[str, float], epoch: int) -> None:
    bad = [f"{name} = {mean}" for name, mean in means.items() if not abs(mean) < float("inf")]
    if bad:
        raise NonFiniteLossError(f"epoch {epoch}: {', '.join(bad)}; the checkpoints of the epoch before are kept")
