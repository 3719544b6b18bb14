"""Whether the parts of a run fit each other: networks, images and labels, any of which may be the user's own.

Checked once, with the first batch, before its step. `distillers.contract` checks the method by itself;
`models.returned` says what a network returns, `dataset.labels` what labels are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from operator import length_hint
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from yacs.config import CfgNode as CN

from ..console import network_name, warn
from ..dataset.batch import fields_of, image_and_label, named_batch
from ..dataset.labels import check_labels, form
from ..dataset.workers import started
from ..distillers import Distiller
from ..distillers.contract import check_scored, only_scores
from ..distributed.ranks import Ranks
from ..errors import UserError
from ..models.copies import has_hooks
from ..models.returned import Doubt, explained, no_feature, returned, tried
from .runtime.seeds import random_state, set_random_state
from .teacher.fast_teacher import DTYPES

# Images whose values go beyond this are hardly normalised: at a standard deviation of 1 they stay below 10.
_NOT_NORMALISED = 100
_FIRST = "the labels of the first training batch"
_FEATURES = ("feats", "preact_feats", "last_map", "pooled_feat")


class Parts:
    """The parts of a run.

    Args:
        distiller: on its device, in training mode.
        train_loader, val_loader: as the trainer uses them.

    Attributes:
        classes: the width of the student's logits; 0 while it is not known.
        doubts: what is unusual in the networks; a method of the user's own may work with it, as the first step shows.
    """

    def __init__(self, distiller: Distiller, train_loader: Any, val_loader: Any, ranks: Ranks, cfg: CN) -> None:
        self.distiller, self.ranks, self.cfg = distiller, ranks, cfg
        self.train_loader, self.val_loader = train_loader, val_loader
        self.classes = 0
        self.doubts: list[Doubt] = []

    def check(self, batch: Mapping[str, Any]) -> None:
        """Check the parts with the first `batch`, on all ranks alike. They and the random generators do not change.

        Raises:
            UserError: two parts do not fit; names the part, its value and what to change.
        """
        problem = ""
        try:
            for check in _CHECKS:
                check(self, batch)
        except UserError as error:
            problem = str(error)
        found = next(filter(None, self.ranks.gather(problem)), "")
        if found:
            raise UserError(found)

    @contextmanager
    def explaining(self, batch: Mapping[str, Any]) -> Iterator[None]:
        """Around the first step, with the `batch`: what it raises is explained by what is unusual in the networks.

        Raises:
            UserError: a feature that a network does not return was read; or the step failed, and a network is unusual.
        """
        with explained(self.doubts):
            try:
                yield
            except KeyError as error:
                name = error.args[0] if error.args else ""
                for role, network in self.networks() if name in _FEATURES and not self.doubts else ():
                    features = returned(network, batch["image"][:2], _owner(role, network))[1]
                    if name not in features:
                        raise no_feature(name, features, _owner(role, network)) from error
                raise

    def networks(self) -> Iterator[tuple[str, nn.Module]]:
        """The student and the frozen networks, by name; but not those with hooks, which are the user's to call."""
        for name in ("student", *self.distiller.frozen):
            network = self.distiller.get_submodule(name)
            # One without parameters stands for a teacher that the method does not need.
            if next(network.parameters(), None) is not None and not has_hooks(network):
                yield name, network

    @contextmanager
    def undisturbed(self, image: Tensor) -> Iterator[None]:
        """In the precision of the step; afterwards the random generators are as before."""
        dtype, state = DTYPES.get(self.cfg.SOLVER.AMP), random_state(image.device)
        try:
            with torch.autocast(image.device.type, dtype, enabled=dtype is not None):
                yield
        finally:
            set_random_state(state, image.device)


def _check_loaders(parts: Parts, batch: Mapping[str, Any]) -> None:
    train, val = (getattr(loader, "train", None) for loader in (parts.train_loader, parts.val_loader))
    if train is False and val is True:
        raise UserError(
            "the training loader yields images in order and not augmented, and the validation loader shuffles and "
            "augments them: they are swapped; the trainer takes (..., train_loader, val_loader, cfg)"
        )


def _check_images(parts: Parts, batch: Mapping[str, Any]) -> None:
    image = batch["image"]
    if _labelled(parts.train_loader):
        check_labels(batch["target"], _FIRST)
    if image.ndim < 2:
        raise UserError(
            f"a batch's image is {form(image)}, not float32 (B, 3, H, W); do the loader's `fields` name its items in "
            "their order?"
        )
    if not image.is_floating_point():
        return
    largest = float(image.detach().abs().max())
    if largest <= _NOT_NORMALISED:
        return
    if largest < float("inf"):
        if parts.ranks.first:
            warn(
                f"the training images have values up to {largest:g}; a network learns best from normalised ones: "
                "divide by 255, subtract the mean, divide by the standard deviation"
            )
    elif parts.cfg.SOLVER.NAN_POLICY == "stop":
        raise UserError(
            f"{int((~image.isfinite()).flatten(1).any(dim=1).sum())} of the first {len(image)} training images have "
            "values that are NaN or infinite; look into the data set's files and its normalisation (a std of 0?)"
        )


def _check_networks(parts: Parts, batch: Mapping[str, Any]) -> None:
    image = batch["image"][:2].nan_to_num()
    with parts.undisturbed(image):
        for name, network in parts.networks():
            found = tried(network, image, _owner(name, network), trains=name == "student")
            if isinstance(found, Doubt):
                parts.doubts.append(found)
            elif found is not None and name == "student":
                parts.classes = found.shape[1]


def _check_labels(parts: Parts, batch: Mapping[str, Any]) -> None:
    if _labelled(parts.train_loader):
        check_labels(batch["target"], _FIRST, parts.classes)
    for loader, words in ((parts.train_loader, "training"), (parts.val_loader, "validation")):
        targets = getattr(loader, "targets", ()) if _labelled(loader) else ()
        try:
            known = np.asarray(targets.cpu() if isinstance(targets, Tensor) else targets)
        except ValueError:  # lists of different lengths
            continue
        if known.ndim == 1 and known.dtype.kind in "iu":
            check_labels(torch.from_numpy(known.astype(np.int64)), f"the {words} loader's targets", parts.classes)


def _labelled(loader: Any) -> bool:
    """Whether a loader's images have labels, as they do where it does not say."""
    return bool(getattr(loader, "labelled", True))


def _check_index(parts: Parts, batch: Mapping[str, Any]) -> None:
    index, targets = batch.get("index"), getattr(parts.train_loader, "targets", None)
    if "index" not in parts.distiller.needs_batch or index is None or targets is None:
        return
    low, high = (int(end) for end in index.aminmax())
    if not 0 <= low <= high < len(targets):
        raise UserError(
            f"a batch's index goes from {low} to {high}, but the training loader's targets are those of {len(targets)} "
            "images; let them be those of all images, as `index` counts them"
        )


def _check_scores(parts: Parts, batch: Mapping[str, Any]) -> None:
    """Of a trainer built by hand too, the network that is scored is the one that is saved."""
    if only_scores(parts.distiller):
        image = batch["image"][:2].nan_to_num()
        with parts.undisturbed(image):
            check_scored(parts.distiller, image)


def _check_validation(parts: Parts, batch: Mapping[str, Any]) -> None:
    """The first batch of a validation DataLoader of the user's own; training would read it after an epoch only.

    Of other loaders, a batch that is read may be missing later.
    """
    loader, image = parts.val_loader, batch["image"]
    if parts.ranks.world == 1 and not length_hint(loader, 1):  # of several, some may have no batch
        raise UserError("the validation loader is empty; give it images to evaluate on")
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return
    with parts.undisturbed(image), _kept_generators(loader):
        batches = started(loader)
        first = next(batches, None)
        del batches  # and with it, its workers
        if first is None:
            return
        own, target = image_and_label(named_batch(first, fields_of(loader)))
        check_labels(target, "the labels of the first validation batch", parts.classes)
        own = own[:2].to(image.device)
        for name, network in parts.networks():
            if name == "student" and not parts.doubts and parts.classes:
                returned(network, own, _owner(name, network), "validation images")


@contextmanager
def _kept_generators(loader: DataLoader[Any]) -> Iterator[None]:
    """Afterwards the generators that a DataLoader and its sampler draw from, which others may share, are as before."""
    holders = (loader, loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
    generators = [own for own in (getattr(holder, "generator", None) for holder in holders) if own is not None]
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states):
            generator.set_state(state)


def _owner(name: str, network: nn.Module) -> str:
    return f"the {name} {network_name(network)}"


_CHECKS = (
    _check_loaders, _check_images, _check_networks, _check_labels, _check_index, _check_scores, _check_validation,
)  # fmt: skip
