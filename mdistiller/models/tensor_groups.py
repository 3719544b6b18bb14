"""Tensors in groups of one kind, for operations on many tensors at once: on a GPU such an operation is one kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def by_kind(*lists: Sequence[Tensor]) -> list[tuple[list[Tensor], ...]]:
    """The lists, which belong together entry by entry, split by the device and dtype of the first one's tensors.

    Returns:
        For each kind, the part of every list.
    """
    if len({(tensor.device, tensor.dtype) for tensor in lists[0]}) == 1:  # the usual case: this runs in every step
        return [tuple(map(list, lists))]
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, ...]]] = {}
    for row in zip(*lists):
        groups.setdefault((row[0].device, row[0].dtype), []).append(row)
    return [tuple(map(list, zip(*rows))) for rows in groups.values()]


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no tensor holds a NaN or an infinity; waits for the device once for each kind."""
    return all(torch.stack(torch._foreach_norm(own)).isfinite().all() for (own,) in by_kind(tensors))
