"""Scoring a network on a data set: on the device, with one synchronisation at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..console import warn
from ..dataset.batch import labelled, to_device
from ..dataset.labels import check_labels
from ..distillers import Distiller, logits_of
from ..distributed.ranks import Ranks
from ..errors import UserError
from ..registry import unknown_name

Heads = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Score:
    """Mean over a data set: top-1 and top-5 accuracy in percent, cross-entropy in nats.

    Without labels, the teacher's prediction takes the place of the label: top-1 is the share of images on which both
    predict the same class, top-5 that of those whose class of the teacher's is among the five highest; and the loss is
    the KL divergence from the teacher's prediction.
    """

    top1: float
    top5: float
    loss: float


@dataclass(frozen=True)
class Measure:
    """What a `Score` is of.

    Attributes:
        name: of its top-1, in words.
        key, loss: of its top-1 and its loss, in the names of metrics.
        labelled: whether the training images have labels, so that training has an accuracy.
    """

    name: str
    key: str
    loss: str
    labelled: bool = True

    @classmethod
    def of(cls, train_loader: Any, val_loader: Any) -> Measure:
        """That of a run."""
        train, val = (getattr(loader, "labelled", True) for loader in (train_loader, val_loader))
        named = ("accuracy", "acc", "loss") if val else ("agreement", "agreement", "kl")
        return cls(*named, labelled=train)

    @property
    def unlabelled(self) -> bool:
        """Whether validation compares with the teacher."""
        return self.key == "agreement"

    def of_steps(self, means: Mapping[str, float]) -> dict[str, float]:
        """The metrics of steps, without accuracies where there are no labels."""
        return {name: mean for name, mean in means.items() if self.labelled or not name.startswith("train_acc")}

    def epoch_line(self, metrics: Mapping[str, float]) -> str:
        """An epoch's main metrics for the terminal."""
        train = f"train_acc {metrics['train_acc']:.2f}, " if self.labelled else ""
        test = f"test_{self.key} {metrics[f'test_{self.key}']:.2f}"
        kl = f", test_kl {metrics['test_kl']:.4f}" if self.unlabelled else ""
        return f"{train}train_loss {metrics['train_loss']:.4f}, {test}{kl}"


ACCURACY = Measure("accuracy", "acc", "loss")


def correct_counts(logits: Tensor, target: Tensor, topk: Sequence[int] = (1, 5)) -> Tensor:
    """The number of targets among the k highest logits, for each k: (len(topk),) int64, on the device.

    Args:
        logits: (B, C). A k above C counts as C.
        target: (B,) int64.
    """
    highest = logits.topk(min(max(topk), logits.shape[1]), dim=1).indices
    hits = highest == target[:, None]
    return torch.stack([hits[:, :k].sum() for k in topk])


def accuracy(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> list[Tensor]:
    """Top-k accuracies of a batch in percent, one (1,) tensor for each k."""
    return list(correct_counts(output, target, topk)[:, None] * (100.0 / len(target)))


def model_heads(model: nn.Module, head: str | None = None) -> Heads:
    """The logits of a network by head name: all of its heads, or the one named `head`.

    A network with several heads has `forward_heads(image) -> {name: logits}`; an ordinary one has the head "".

    Raises:
        UserError: the network has no head of that name.
    """
    heads: Heads = getattr(model, "forward_heads", None) or (lambda image: {"": model(image)[0]})
    if head is None:
        return heads
    names = getattr(model, "head_names", ())
    if not names:
        raise UserError(f"{type(model).__name__} has one head; leave out --head {head}")
    if head not in names:
        raise unknown_name("head", head, names)
    return lambda image: {head: heads(image)[head]}


def evaluate(
    loader: Iterable[Any], heads: Heads, device: torch.device, ranks: Ranks | None = None,
    teacher: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Score]:  # fmt: skip
    """Score every head on a data set, by its labels or by its agreement with the teacher.

    Args:
        loader: batches with an image and a target, by name; see `fields_of`.
        heads: maps an image batch on `device` to logits (B, C) by head name.
        ranks: the processes that share the data set; each gets the scores of the whole data set.
        teacher: image -> its logits (B, C), for images without labels.

    Raises:
        UserError: a batch has no image or no target, a label is no class, or the loader is empty; or there are no
            labels, and no teacher of as many classes.
    """
    if teacher is None and not getattr(loader, "labelled", True):
        raise UserError("these images have no labels to score by; class folders (-d folder) tell them")
    totals: dict[str, Tensor] = {}
    count = 0
    with torch.inference_mode():
        for image, target in labelled(loader):
            host, image, target = target, to_device(image, device), to_device(target, device)
            count += len(target)
            reference = None if teacher is None else teacher(image)
            target = target if reference is None else reference.argmax(dim=1)
            for name, logits in heads(image).items():
                if reference is not None:
                    loss = _divergence(logits, reference)
                else:
                    if host.device.type == "cpu":  # those of our own loaders on a GPU have been checked as a whole
                        check_labels(host, "the labels of a validation batch", logits.shape[1])
                    loss = F.cross_entropy(logits.float(), target, reduction="sum").double()
                sums = torch.cat([correct_counts(logits, target).double(), loss[None]])
                totals[name] = totals[name] + sums if name in totals else sums
    shares = (ranks or Ranks()).gather((count, {name: sums.tolist() for name, sums in totals.items()}))
    count = sum(own for own, _ in shares)
    if not count:
        raise UserError("nothing to evaluate on: the validation set is empty")
    names = next(sums for own, sums in shares if own)
    return {name: _score([sums[name] for own, sums in shares if own], count) for name in names}


def _divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """KL divergence () from the teacher's prediction to the network's, summed over the images."""
    if logits.shape != reference.shape:
        raise UserError(
            f"the network tells {logits.shape[1]} classes and its teacher {reference.shape[1]}, so that they cannot be "
            f"compared; set DATASET.NUM_CLASSES {reference.shape[1]}"
        )
    own, theirs = (F.log_softmax(values.float(), dim=1) for values in (logits, reference))
    return F.kl_div(own, theirs, reduction="sum", log_target=True).double()


def _score(shares: list[list[float]], count: int) -> Score:
    """The score from each rank's sums of top-1 hits, top-5 hits and losses."""
    top1, top5, loss = (sum(values) / count for values in zip(*shares))
    return Score(100 * top1, 100 * top5, loss)


def score_teacher(loader: Iterable[Any], teacher: nn.Module, device: torch.device, ranks: Ranks) -> str:
    """The teacher's score in one line; warns if its top-1 accuracy is no better than chance.

    Better than chance is more than three standard deviations above 1 / classes.

    Args:
        loader, device, ranks: as of `evaluate`.
        teacher: in eval mode.
    """
    images = classes = 0

    def heads(image: Tensor) -> dict[str, Tensor]:
        nonlocal images, classes
        logits = logits_of(teacher(image))
        images, classes = images + len(logits), logits.shape[1]
        return {"": logits}

    (score,) = evaluate(loader, heads, device, ranks).values()
    shares = ranks.gather((images, classes))
    images, chance = sum(own for own, _ in shares), 1 / max(width for _, width in shares)
    line = f"teacher: top-1 {score.top1:.2f}, top-5 {score.top5:.2f}, loss {score.loss:.4f} on {images} images"
    if ranks.first and score.top1 / 100 <= chance + 3 * math.sqrt(chance * (1 - chance) / images):
        warn(
            "the teacher is no better than chance: check DISTILLER.TEACHER_CKPT, and that it was trained on this data "
            "set, with its order of classes and its normalisation"
        )
    return line


class ScoreRecord:
    """The top-1 accuracy of every head, in percent.

    Attributes:
        best, last: of the best and of the last epoch, by the head's name.
    """

    def __init__(self) -> None:
        self.best: dict[str, float] = {}
        self.last: dict[str, float] = {}

    def note(self, scores: Mapping[str, Score]) -> list[str]:
        """Record an epoch's scores; returns the heads that reached their best.

        The heads may differ from those so far, as those of a resumed run do if SOLVER.EMA has changed: the main one,
        which is the first, keeps its best under any name, and a head that is new starts without one.
        """
        self.last = {name: score.top1 for name, score in scores.items()}
        before = {next(iter(scores)): next(iter(self.best.values()), 0.0)} | self.best
        improved = [name for name, top1 in self.last.items() if top1 >= before.get(name, 0.0)]
        self.best = {name: max(top1, before.get(name, 0.0)) for name, top1 in self.last.items()}
        return improved

    def state_dict(self) -> dict[str, Any]:
        """The state for `load_state_dict`, with the main head's best under the original's key."""
        main = next(iter(self.best.values()), 0.0)
        return {"best_acc": main, "head_best_acc": dict(self.best), "head_last_acc": dict(self.last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state; the original's holds one number, because it has only one head."""
        best = state.get("head_best_acc", {"": float(state["best_acc"])})
        last = state.get("head_last_acc", best)
        self.best, self.last = ({str(name): float(top1) for name, top1 in heads.items()} for heads in (best, last))


def evaluate_distiller(loader: Iterable[Any], distiller: Distiller) -> dict[str, Score]:
    """Score every head of a distiller; leaves it in eval mode."""
    distiller.eval()
    device = next(distiller.parameters()).device
    return evaluate(loader, distiller.forward_heads, device)


def by_head(name: str, values: Mapping[str, float]) -> dict[str, float]:
    """The first head's value under `name`; with several heads, also each one's under `name_head_<head>`."""
    named = {name: next(iter(values.values()))}
    if len(values) > 1:
        named |= {f"{name}_head_{head}": value for head, value in values.items()}
    return named


def epoch_metrics(
    means: dict[str, float], scores: dict[str, Score], measure: Measure = ACCURACY
) -> dict[str, float]:
    """Training means and validation scores under the original's names, or without labels under those of `measure`."""
    first, means = next(iter(scores.values())), measure.of_steps(means)
    metrics = {
        **({"train_acc": means["train_acc"]} if measure.labelled else {}),
        "train_loss": means["train_loss"],
        **by_head(f"test_{measure.key}", {name: score.top1 for name, score in scores.items()}),
        f"test_{measure.key}_top5": first.top5,
        f"test_{measure.loss}": first.loss,
    }
    return metrics | {name: mean for name, mean in means.items() if name not in metrics}
