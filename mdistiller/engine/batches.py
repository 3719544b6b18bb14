"""Named batches: what a loader yields, as the tensors that a method asks for, on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from yacs.config import CfgNode as CN

from ..dataset.batch import VIEWS, batch_on_device, fields_of, host_index, image_and_label, named_batch
from ..dataset.contrastive import ContrastiveSampler
from ..dataset.labels import check_labels, form
from ..dataset.mixing import Erasing, Mixing
from ..dataset.workers import started
from ..distillers import Distiller
from ..errors import UserError
from ..registry import Registry, unknown_name

Fields = dict[str, Tensor]

# A field that the trainer itself can provide -> function of (loader, names of its fields, device, cfg): a function of
# (fields, epoch).
field_dict = Registry("field of the batch")


@field_dict.register("contrastive_index")
def contrastive_index(
    loader: Any, fields: Sequence[str], device: torch.device, cfg: CN
) -> Callable[[Fields, int], Tensor]:
    """(B, K + 1) int64: a positive and K negatives of each image, drawn from (seed, epoch, index).

    Raises:
        UserError: the loader does not tell its `targets`, (N,) labels of all images, or a batch has no `index`.
    """
    if "index" not in fields:
        raise UserError(f"contrastive_index is drawn for each image's index, but a batch has only {', '.join(fields)}")
    targets = getattr(loader, "targets", None)
    if targets is None:
        raise UserError(
            f"contrastive_index is drawn from the labels of all images, but {type(loader).__name__} has no `targets`; "
            "set that attribute of the training loader to the (N,) labels, or let the loader yield contrastive_index"
        )
    return DrawnAhead(ContrastiveSampler(targets, cfg.CRD.NCE.K, cfg.CRD.MODE, cfg.EXPERIMENT.SEED).to(device))


class DrawnAhead:
    """The `contrastive_index` of each batch, drawn while the step before it runs, where the loader tells the order.

    It never waits for the device: indices are read on the CPU, and what is drawn goes to a GPU from pinned memory.
    """

    def __init__(self, sampler: ContrastiveSampler) -> None:
        self.sampler = sampler
        self._ahead: tuple[Tensor, int, Callable[[], Tensor]] | None = None

    def __call__(self, fields: Fields, epoch: int) -> Tensor:
        now, following = host_index(fields["index"])
        ahead, self._ahead = self._ahead, None
        # Not what was foreseen: another pass began, or a broken image was replaced.
        if ahead is None or ahead[1] != epoch or not torch.equal(ahead[0], now):
            ahead = now, epoch, self.sampler.begin(now, epoch)
        drawn = ahead[2]()
        if len(following):
            self._ahead = following, epoch, self.sampler.begin(following, epoch)
        return drawn


def batch_changes(cfg: CN) -> list[Callable[[Fields, int], Fields]]:
    """What the settings change in whole batches, as functions of (fields, epoch): erasing first, then mixing."""
    data, seed = cfg.DATASET, cfg.EXPERIMENT.SEED
    erasing = [Erasing(data.ERASING, seed)] if data.ERASING else []
    mixing = [Mixing(data.MIXUP, data.CUTMIX, seed)] if data.MIXUP or data.CUTMIX else []
    return [*erasing, *mixing]


class BatchReader:
    """Turns the batches of a training loader into named tensors, and adds the fields that only the trainer provides.

    It also mixes and erases the images, where DATASET.MIXUP, CUTMIX and ERASING ask for it; see `dataset.mixing`.

    Args:
        distiller: its `needs_batch` is checked.
        loader: what it yields is named by its `fields`, or by its dictionaries; see `dataset.batch`.
        device: where the tensors are moved.
        cfg: the whole configuration tree.

    Attributes:
        classes: C, to refuse labels that are no class; 0 if the labels of all images have been checked.

    Raises:
        UserError: nobody provides a field that the method needs; the message suggests near names. Or the loader does
            not augment its images as DATASET.AUGMENT says.
    """

    def __init__(self, distiller: Distiller, loader: Any, device: torch.device, cfg: CN) -> None:
        self.method, self.needs = type(distiller).__name__, distiller.needs_batch
        _check_augmentation(loader, cfg.DATASET.AUGMENT)
        views = set(VIEWS).intersection(self.needs).difference(fields_of(loader))
        if views and hasattr(loader, "with_views"):
            loader.with_views()
        self.changes = batch_changes(cfg)
        self.fields, self.device = fields_of(loader), device
        self.classes = 0
        self.contiguous = not cfg.SOLVER.CHANNELS_LAST
        if (self.needs or self.changes) and not hasattr(loader, "fields"):
            self.fields = _fields_of_first(loader, self.fields)
        missing = [name for name in self.needs if name not in self.fields]
        for name in missing:
            if name not in field_dict:
                known = [*self.fields, *field_dict]
                raise unknown_name(f"field of the batch ({self.method}.needs_batch)", name, known)
        self.added = {name: field_dict[name](loader, self.fields, device, cfg) for name in missing}

    def __call__(self, batch: Any, epoch: int) -> Fields:
        """The tensors of a batch by name.

        Raises:
            UserError: a field that the method needs is not in it.
        """
        named = named_batch(batch, self.fields)
        image, target = image_and_label(named)
        if self.classes and target.device.type == "cpu":
            check_labels(target, "the labels of a training batch", self.classes)
        fields = batch_on_device({**named, "image": image, "target": target}, self.device)
        for name in self.needs:
            if name not in fields and name not in self.added:
                raise UserError(
                    f"{self.method} needs the field {name!r} of the batch as a tensor; the loader's batch has "
                    f"{', '.join(named) or 'none'}"
                )
        if self.changes and "index" not in fields:
            raise UserError(
                "DATASET.MIXUP, CUTMIX and ERASING are drawn for each image's index, but a batch has only "
                f"{', '.join(named)}; let the loader yield index, each image's place in the training set, or set them "
                "to 0"
            )
        index = fields["index"] if "index" in self.needs or self.changes else target
        if index.shape != target.shape or (index is not target and index.is_floating_point()):
            raise UserError(f"a batch's index is {form(index)}, not each image's place in the training set, (B,) int64")
        for change in self.changes:
            fields = change(fields, epoch)
        if self.contiguous:
            fields |= {name: fields[name].contiguous() for name in ("image", *VIEWS) if name in fields}
        for name, make in self.added.items():
            fields[name] = make(fields, epoch)
        return fields


def _check_augmentation(loader: Any, wanted: str) -> None:
    """Refuse a loader that does not augment its images as DATASET.AUGMENT says: one of the user's own."""
    if wanted and getattr(loader, "augmentation", "") != wanted:
        raise UserError(
            f"DATASET.AUGMENT {wanted} is for the data sets of this library, and the training images come from a "
            f"{type(loader).__name__} of your own; let it augment them, and leave DATASET.AUGMENT empty"
        )


def _fields_of_first(loader: Any, fields: tuple[str, ...]) -> tuple[str, ...]:
    """The names of what a loader without `fields` yields, by its first batch; `fields` for one that has one pass."""
    iterator = started(loader)
    if iterator is loader:
        return fields
    return tuple(named_batch(next(iterator, {}), fields)) or fields


def calling(batches: Iterable[Any], call: Callable[[], None], rounds: int | None = None) -> Iterator[Any]:
    """`batches`, with a `call` before each one.

    Args:
        rounds: make exactly so many calls, the rest of them after the last batch: several ranks, of which some have
            fewer batches, then call equally often.
    """
    calls = 0
    for batch in batches:
        if rounds is None or calls < rounds:
            calls += 1
            call()
        yield batch
    for _ in range(calls, rounds or 0):
        call()


def batches_from(loader: Any, start: int) -> Iterator[Any]:
    """The rest of an epoch, from batch number `start` (from 0) on."""
    if hasattr(loader, "iter_from"):
        return loader.iter_from(start)  # type: ignore[no-any-return]
    batches = started(loader)
    for _ in range(start):
        next(batches, None)
    return batches
