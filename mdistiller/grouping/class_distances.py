"""How far classes are apart in a network's features: WKD's costs of moving probability, computed, saved and loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..paths import find_file
from ..user_files import read_json, reading, writing

_NEXT = "mdistiller group-classes --class-distances FILE writes one"
SUFFIXES = (".npy", ".json")


def class_distances(features: Tensor, targets: Tensor, per_class: int = 256) -> Tensor:
    """1 - CKA between the images of every two classes.

        D_ij = 1 - <K_i, K_j> / (|K_i| |K_j|),   K_i = H X_i X_i' H,   H = 1 - 1 / b

    X_i (b, D) are the features of the first b images of class i: as many as the smallest class has, `per_class` at
    most. CKA compares paired images; here it pairs the n-th image of one class with the n-th of the other. D is
    symmetric, from 0, on the diagonal, to 1. A class all of whose features are equal has distance 1 to all others.

    It takes C b^2 D operations and C b^2 numbers of memory.

    Args:
        features: (N, D), such as a teacher's pooled features of the training images, not augmented.
        targets: (N,) the labels, from 0 to C - 1.

    Returns:
        (C, C), float32; float64 for features of that type.

    Raises:
        UserError: a class has fewer than two images.

    Reference: Lv et al. 2024, arXiv 2412.08139, section 3.1; Kornblith et al. 2019, arXiv 1905.00414.
    """
    counts = torch.bincount(targets)
    images = min(per_class, int(counts.min()))
    if images < 2:
        raise UserError(
            f"class {int(counts.argmin())} has {int(counts.min())} images; distances of classes need two of each class"
        )
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    kernels = []
    for label in range(len(counts)):
        own = features[targets == label][:images].to(dtype)
        own = own - own.mean(dim=0)
        kernel = (own @ own.T).flatten()
        kernels.append(kernel / kernel.norm().clamp(min=torch.finfo(dtype).tiny))
    rows = torch.stack(kernels)
    return (1 - rows @ rows.T).clamp(0, 1).fill_diagonal_(0)


def save_distances(path: Path, distances: Tensor) -> None:
    """Write distances (C, C) as .npy or .json, by the ending.

    Raises:
        UserError: another ending, or the file cannot be written.
    """
    check_suffix(path)
    with writing(path):
        if path.suffix == ".npy":
            np.save(path, distances.numpy())
        else:
            path.write_text(json.dumps({"distances": distances.tolist()}) + "\n", encoding="utf-8")


def load_distances(source: str, key: str) -> Tensor:
    """The distances (C, C) in a .npy file, or in a .json file that holds them alone or under "distances".

    Args:
        source: a relative path is looked for in the current folder, then in the project's own files.
        key: the setting that names the file, for messages.

    Raises:
        UserError: there is no such file, or it does not hold (C, C) finite numbers, C >= 2.
    """
    if not source.endswith(SUFFIXES):
        raise UserError(f'{key} must be "fc", or a file of class distances, .npy or .json, not {source!r}; {_NEXT}')
    path = find_file(source)
    if path is None:
        raise UserError(f"{key}: no file {source}; {_NEXT}")
    values = _numbers(_content(path, key))
    if values is None or values.ndim != 2 or values.shape[0] != values.shape[1] or len(values) < 2:
        what = f"numbers of shape {values.shape}" if values is not None else "something else"
        raise UserError(f"{key}: {source} must hold (C, C) numbers, C >= 2, it holds {what}; {_NEXT}")
    if not np.isfinite(values).all():
        raise UserError(f"{key}: {source} holds NaN or infinite distances; {_NEXT}")
    return torch.from_numpy(values)


def check_suffix(path: Path) -> None:
    """Refuse a file name with another ending than .npy and .json."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"class distances are written as {' or '.join(SUFFIXES)}, not as {path.name!r}")


def _content(path: Path, key: str) -> Any:
    what = f"{path} ({key})"
    if path.suffix == ".json":
        content = read_json(path, f"file of class distances ({key})", _NEXT)
        return content.get("distances") if isinstance(content, dict) else content
    with reading(what, _NEXT):
        try:
            return np.load(path, allow_pickle=False)
        except (ValueError, EOFError):
            raise UserError(f"{what} is no .npy file of numbers; {_NEXT}") from None


def _numbers(content: Any) -> np.ndarray | None:
    """As float64; None for what is no array of numbers."""
    try:
        values = np.asarray(content)
        return values.astype(np.float64) if values.dtype.kind in "iuf" else None
    except (ValueError, TypeError):  # rows of several lengths
        return None
