"""What a batch holds, by name. A loader names the items of its tuples in `fields`, or yields dictionaries.

Also how its tensors reach the device without waiting for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from .labels import as_labels
from .workers import started

# The items of a loader without `fields`: what the original's loaders yield.
FIELDS = ("image", "target", "index")
# Two views of each image, which a loader with `with_views()` yields where a method asks for them.
VIEWS = ("image_weak", "image_strong")


def fields_of(loader: Any) -> tuple[str, ...]:
    """The names of the items of a loader's batches, in order: its attribute `fields`, or else `FIELDS`.

    Raises:
        UserError: `fields` is not a tuple or list of different names.
    """
    fields = getattr(loader, "fields", FIELDS)
    names = tuple(fields) if isinstance(fields, (tuple, list)) else ()
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise UserError(f"a loader's `fields` must be a tuple of different names, such as {FIELDS}, not {fields!r}")
    return names


def named_batch(batch: Any, fields: tuple[str, ...]) -> dict[str, Any]:
    """A loader's batch by name.

    Args:
        batch: a mapping, which has the names already; or a tuple or list of the items `fields`, of which the last may
            be absent: validation loaders often yield the first two alone.
        fields: see `fields_of`.

    Raises:
        UserError: it has more items than `fields`, or is no tuple, list or mapping.
    """
    if isinstance(batch, Mapping):
        return dict(batch)
    if not isinstance(batch, (tuple, list)):
        raise UserError(
            f"a batch is a {type(batch).__name__}; a loader must yield tuples ({', '.join(fields)}) or dictionaries"
        )
    if len(batch) > len(fields):
        raise UserError(
            f"a batch has {len(batch)} items, but its loader names {len(fields)} ({', '.join(fields)}); set the "
            "loader's `fields` to the names of all its items"
        )
    return dict(zip(fields, batch))


def check_fields(batch: Mapping[str, Any], needed: Iterable[str]) -> None:
    """Refuse a batch without the items `needed`.

    Raises:
        UserError: naming them, and the items that it has.
    """
    absent = [repr(name) for name in needed if name not in batch]
    if absent:
        has = ", ".join(map(repr, batch)) or "nothing"
        raise UserError(
            f"a batch has no {' and no '.join(absent)}, but {has}; set the loader's `fields` to the names of its "
            "items, or yield a dictionary with these"
        )


def check_tensors(batch: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse a batch of which an item is something else than a tensor.

    Raises:
        UserError: naming the item and its type.
    """
    for name in names:
        item = batch[name]
        if not isinstance(item, Tensor):
            of = f" of {type(item[0]).__name__}" if isinstance(item, (list, tuple)) and item else ""
            raise UserError(
                f"a batch's {name!r} is a {type(item).__name__}{of}, not a tensor of one entry for each image; let the "
                "data set return tensors, arrays or numbers, which torch's DataLoader collates to tensors"
            )


def labelled(loader: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """(image, target) of each batch of a loader.

    Raises:
        UserError: a batch has no such items, or they are no tensors; see `named_batch` and `check_fields`.
            Or a worker fails; see `started`.
    """
    fields = fields_of(loader)
    for batch in started(loader):
        yield image_and_label(named_batch(batch, fields))


def image_and_label(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The images of a named batch, and their labels as int64.

    Raises:
        UserError: it has none, or they are no tensors of equal length.
    """
    check_fields(batch, FIELDS[:2])
    check_tensors(batch, FIELDS[:2])
    image, target = batch["image"], as_labels(batch["target"])
    if image.shape[:1] != target.shape[:1] or not len(target):
        raise UserError(
            f"a batch has images {tuple(image.shape)} and labels {tuple(target.shape)}; their first dimension must be "
            "the same number of images, 1 or more"
        )
    return image, target


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; to a GPU from pinned memory, because a copy from other memory waits for the GPU's work."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class HostIndex(NamedTuple):
    """The indices of a batch as they are known on the CPU.

    Attributes:
        now: (B,) int64, of this batch.
        following: (B',) int64, of the next batch of this pass, as far as the loader knows; empty if it does not.
    """

    now: Tensor
    following: Tensor


def with_host_index(index: Tensor, host: HostIndex) -> Tensor:
    """Let the tensor `index` carry what the CPU knows of it; returns `index`. No operation on it passes this on."""
    index.__dict__["host_index"] = host
    return index


def host_index(index: Tensor) -> HostIndex:
    """What `index` carries; of one that carries nothing, a copy, which waits for the device if it is there."""
    carried: HostIndex | None = index.__dict__.get("host_index")
    return carried or HostIndex(index.cpu(), torch.empty(0, dtype=torch.int64))


def batch_on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """The tensors of a named batch on `device`; `index` carries what the CPU knows of it."""
    fields = {name: to_device(item, device) for name, item in batch.items() if isinstance(item, Tensor)}
    index = batch.get("index")
    if isinstance(index, Tensor) and ("host_index" in index.__dict__ or index.device.type == "cpu"):
        with_host_index(fields["index"], host_index(index))
    return fields
