"""Labels: one whole number from 0 to C - 1 for each image; checked where a data set is read and a batch arrives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UserError

# The target of an image without a label. No loss takes it: a method that reads it by mistake fails in its first step.
NO_LABEL = -1

_ONE_NUMBER = "a label is one whole number for each image, (N,) int64"


def form(tensor: Tensor) -> str:
    """A tensor's dtype and shape in words: "float64 (8, 3)"."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def as_labels(target: Tensor) -> Tensor:
    """(B,) int64: labels of any whole type as torch's losses need them; all others as they are, to be refused."""
    if target.dtype == torch.int64 or target.is_floating_point() or target.is_complex():
        return target
    return target.long()


def without_labels(targets: Any) -> bool:
    """Whether the images of `targets` (N,) have no labels: every one is `NO_LABEL`."""
    return isinstance(targets, Tensor) and targets.ndim == 1 and len(targets) > 0 and bool((targets == NO_LABEL).all())


def check_labels(labels: Any, whose: str, classes: int = 0) -> None:
    """Refuse labels that are not (N,) whole numbers, of which none is negative.

    Args:
        whose: where they come from, for the message.
        classes: C: none may be C or more; 0 if it is not known.

    Raises:
        UserError: names the first wrong one, its place, and what to change.
    """
    if not isinstance(labels, Tensor):
        raise UserError(f"{whose} are a {type(labels).__name__}; {_ONE_NUMBER}: torch.as_tensor(labels)")
    if labels.is_floating_point() or labels.is_complex():
        raise UserError(f"{whose} are {form(labels)}; {_ONE_NUMBER}: {_as_whole(labels)}")
    if labels.ndim != 1:
        raise UserError(f"{whose} are {form(labels)}; {_ONE_NUMBER}: {_flat(labels)}")
    if not len(labels) or labels.dtype == torch.bool:
        return
    low, high = (int(end) for end in labels.aminmax())
    if low >= 0 and (high < classes or not classes):
        return
    wrong = ((labels < 0) | (labels >= (classes or high + 1))).nonzero()[:, 0]
    raise UserError(
        f"{whose} go from {low} to {high}, but a label is 0 to {classes - 1 if classes else 'C - 1'}: {len(wrong)} of "
        f"{len(labels)} are not, the first is {int(labels[wrong[0]])} at {int(wrong[0])}; {_remedy(low, high, classes)}"
    )


def _remedy(low: int, high: int, classes: int) -> str:
    if low < 0:
        return "leave out the images without a label, or give them one"
    if low >= 1 and high == classes:
        return "if they count from 1, subtract 1"
    return f"number the classes from 0, or let data set and network have more than {classes} classes"


def _as_whole(labels: Tensor) -> str:
    return _flat(labels) if labels.ndim > 1 else "labels.long()"


def _flat(labels: Tensor) -> str:
    if labels.ndim > 2:
        return "these look like images; do the loader's `fields` name its items in their order?"
    one_hot = labels.ndim == 2 and labels.shape[1] > 1
    return "labels.argmax(dim=1), if they are one-hot" if one_hot else "labels.flatten()"
