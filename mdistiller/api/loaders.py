"""The loaders of a caller, with what a method needs: each image's index, and the labels of all images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset

from ..console import note
from ..dataset import Loader
from ..dataset.batch import fields_of, image_and_label, named_batch
from ..dataset.labels import as_labels
from ..dataset.workers import started
from ..errors import UserError

INDEX, NEGATIVES = "index", "contrastive_index"


def first_batch(loader: Any) -> dict[str, Any]:
    """The first batch of a loader, by name; the generators that the loader itself draws from are as before.

    Raises:
        UserError: it yields none, or one without an image and a target.
    """
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise UserError(f"the training loader is a {type(loader).__name__}; give a loader, which yields batches")
    with _kept_generators(loader):
        batches = started(loader)
        if batches is loader:
            raise UserError(
                f"the training loader, a {type(loader).__name__}, can be gone through once only; give one whose "
                "iter() begins anew in every epoch, as a torch DataLoader's does"
            )
        first = next(batches, None)
        del batches  # and with it, its workers
    if first is None:
        raise UserError("the training loader yields no batch; give it images, or leave out drop_last")
    batch = named_batch(first, fields_of(loader))
    image_and_label(batch)
    return batch


@contextmanager
def _kept_generators(loader: Any) -> Iterator[None]:
    samplers = [getattr(loader, name, None) for name in ("sampler", "batch_sampler")]
    holders = [loader, *samplers, getattr(samplers[1], "sampler", None)]
    generators = [own for own in (getattr(holder, "generator", None) for holder in holders) if own is not None]
    states = [generator.get_state() for generator in generators]
    epoch = {name: vars(loader)[name] for name in ("epoch", "_next_epoch")} if isinstance(loader, Loader) else {}
    try:
        yield
    finally:
        for generator, state in zip(generators, states):
            generator.set_state(state)
        if epoch:
            vars(loader).update(epoch)


def batch_size_of(loader: Any, batch: Mapping[str, Any]) -> int:
    """Images of a full batch: what the loader says, or those of its first `batch`."""
    size = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) else len(batch["target"])


def image_size_of(batch: Mapping[str, Any]) -> int:
    """Height and width of a batch's images (B, 3, H, W).

    Raises:
        UserError: they are not square images of that form.
    """
    shape = tuple(batch["image"].shape)
    if len(shape) != 4:
        raise UserError(f"a batch's images are {shape}, not (B, 3, H, W); let the data set return images (3, H, W)")
    if shape[2] != shape[3]:
        raise UserError(
            f"the images are {shape[2]} high and {shape[3]} wide, and networks are checked with square ones; crop or "
            "resize them to a square in the data set"
        )
    return int(shape[2])


def class_names_of(loader: Any, classes: int) -> tuple[str, ...]:
    """The names of the classes, by label, where the loader or its data set tells them; else none."""
    names = getattr(loader, "class_names", None) or getattr(getattr(loader, "dataset", None), "classes", None)
    fit = isinstance(names, Sequence) and len(names) == classes and all(isinstance(name, str) for name in names)
    return tuple(names) if fit else ()  # type: ignore[arg-type]


def prepared(loader: Any, batch: Mapping[str, Any], needs: Sequence[str], facts: Mapping[str, Any]) -> Any:
    """The training loader with the fields that a method `needs`, in the same order and batches.

    Args:
        batch: its first.
        needs: names of fields; an `index` is added to the batches of a torch DataLoader, and for `contrastive_index`
            the labels of all images are found.
        facts: see `telling`.

    Raises:
        UserError: it cannot be done; says what to change.
    """
    loader = telling(loader, facts)
    if not isinstance(loader, DataLoader):
        return loader
    if INDEX in needs and INDEX not in batch:
        loader = with_index(loader)
    if NEGATIVES in needs and NEGATIVES not in batch and getattr(loader, "targets", None) is None:
        loader = _like(loader, targets=targets_of(loader))
    return loader


def telling(loader: Any, facts: Mapping[str, Any]) -> Any:
    """A torch DataLoader that tells the names of its classes and `facts`, as checkpoints do; any other loader as it is.

    Args:
        facts: `num_classes`, and what is known of `mean`, `std` and `image_size`.
    """
    if not isinstance(loader, DataLoader):
        return loader
    told = {**facts, "class_names": class_names_of(loader, facts["num_classes"])}
    return _like(loader, **{name: fact for name, fact in told.items() if fact})


def count_of(loader: Any) -> int | None:
    """N, the number of images of a loader's data set; None if it does not tell."""
    targets, items = getattr(loader, "targets", None), getattr(loader, "dataset", None)
    if targets is not None:
        return len(targets)
    return None if items is None or isinstance(items, IterableDataset) or not hasattr(items, "__len__") else len(items)


def with_index(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A DataLoader whose batches also hold `index` (B,) int64, each image's place in the data set.

    Its sampler, workers and collation are those of `loader`; its batches are dictionaries.

    Raises:
        UserError: the data set has no places, because it is a stream, or the loader does not batch itself.
    """
    remedy = "let it yield each image's place in the data set as a third item, or as 'index' of a dictionary"
    if isinstance(loader.dataset, IterableDataset):
        raise UserError(
            f"the method needs each image's index, and a stream ({type(loader.dataset).__name__}) has none; {remedy}"
        )
    if loader.batch_sampler is None:
        raise UserError(
            f"the method needs each image's index, and a DataLoader with batch_size=None batches elsewhere; {remedy}"
        )
    collate = _CollateIndexed(loader.collate_fn, fields_of(loader))
    return _like(loader, dataset=IndexedDataset(loader.dataset), collate_fn=collate)


def _like(loader: DataLoader[Any], **changed: Any) -> DataLoader[Any]:
    """A copy of `loader` of the same class, with other attributes, also those that it does not let anyone set."""
    other = copy.copy(loader)
    vars(other).update(changed, _iterator=None)  # the workers of `loader` are its own
    return other


class IndexedDataset(Dataset[tuple[Any, int]]):
    """A data set whose items are (item, index) of another one's."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.items[index], index

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, int]]:
        """Several at once, as a DataLoader asks for them, and as the other data set may read them faster."""
        at_once: Callable[[list[int]], Any] | None = getattr(self.items, "__getitems__", None)
        found = at_once(indices) if at_once is not None else [self.items[index] for index in indices]
        return list(zip(found, indices))


class _CollateIndexed:
    """Collates (item, index) pairs: the items as their loader does, by name, and the indices beside them."""

    def __init__(self, collate: Callable[[list[Any]], Any], fields: tuple[str, ...]) -> None:
        self.collate, self.fields = collate, fields

    def __call__(self, pairs: list[tuple[Any, int]]) -> dict[str, Any]:
        items, indices = zip(*pairs)
        index = torch.tensor([int(one) for one in indices], dtype=torch.int64)
        return {**named_batch(self.collate(list(items)), self.fields), INDEX: index}


def targets_of(loader: DataLoader[Any]) -> Tensor:
    """(N,) int64: the labels of all images of a loader's data set, by index.

    They are read from the data set's own list, or else in one pass over its images.

    Raises:
        UserError: the data set is a stream.
    """
    items = loader.dataset.items if isinstance(loader.dataset, IndexedDataset) else loader.dataset
    if isinstance(items, IterableDataset):
        raise UserError("the method needs the labels of all images, and a stream has none; set loader.targets to them")
    known = _listed(items)
    return _read(loader, items) if known is None else known


def _listed(items: Any) -> Tensor | None:
    """The labels of a data set that tells them; None if it does not."""
    if isinstance(items, Subset):
        above = _listed(items.dataset)
        return None if above is None else above[torch.as_tensor(items.indices, dtype=torch.int64)]
    if isinstance(items, ConcatDataset):
        parts = [_listed(part) for part in items.datasets]
        known = [part for part in parts if part is not None]
        return torch.cat(known) if len(known) == len(parts) else None
    if getattr(items, "target_transform", None) is not None:  # its own list holds other labels than it returns
        return None
    tensors = getattr(items, "tensors", None)
    candidates = [getattr(items, name, None) for name in ("targets", "labels")]
    if isinstance(tensors, tuple) and len(tensors) > 1:
        candidates.append(tensors[1])
    found = (labels for labels in map(_as_labels, candidates) if labels is not None)
    return next((labels for labels in found if len(labels) == len(items)), None)


def _as_labels(values: Any) -> Tensor | None:
    """(N,) int64, or None for anything else."""
    try:
        labels = as_labels(torch.as_tensor(values))
    except (TypeError, ValueError, RuntimeError):
        return None
    return labels.cpu() if labels.ndim == 1 and labels.dtype == torch.int64 else None


def _read(loader: DataLoader[Any], items: Any) -> Tensor:
    """The labels of all images, read one after the other."""
    note(f"reading the labels of {len(items)} images; give {type(items).__name__} an attribute `targets` to save it")
    plain = DataLoader(
        items, batch_size=64, num_workers=loader.num_workers, worker_init_fn=loader.worker_init_fn,
        collate_fn=loader.collate_fn.collate if isinstance(loader.collate_fn, _CollateIndexed) else loader.collate_fn,
        generator=torch.Generator(), multiprocessing_context=loader.multiprocessing_context,
    )  # fmt: skip
    fields = fields_of(loader)
    return torch.cat([image_and_label(named_batch(batch, fields))[1] for batch in started(plain)])
