"""Group the classes that a teacher confuses, for DCGD; writes the groups (JSON) and the confusion matrix (PNG).

    mdistiller group-classes -m resnet56 --num-groups 5 -o output/groups/res56.json
    mdistiller group-classes -m wrn_16_2 -c output/digits/teacher,wrn_16_2/student_best -d digits --num-groups 2 \\
        --split kfold -o output/groups/digits.json

With --class-distances output/groups/res56.npy it also writes the distances between classes that WKD.COST_MATRIX takes.

For CIFAR-100 its 20 super-classes are grouped, for other data sets their classes. To train with the groups, set
DCGD.GROUPS FILE and a plain student, such as DISTILLER.STUDENT resnet20.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from ..arguments import PathArgument
from ..console import tool, warn
from ..dataset import DatasetInfo, Loader, get_val_loader, info_of, stratified_split
from ..dataset.batch import labelled
from ..engine.build import load_trained, own_view
from ..engine.cfg import settings_for
from ..engine.files.checkpoint import check_file_classes
from ..errors import UserError
from ..grouping import (
    class_distances,
    count_confusions,
    cross_predict,
    draw_confusion,
    expand,
    group_by_confusion,
    merge_classes,
    save_distances,
    save_groups,
)
from ..grouping.cifar100 import SUPERCLASS, SUPERCLASS_NAMES
from ..grouping.class_distances import check_suffix
from ..registry import unknown_name
from ._arguments import (
    check_batch_size,
    check_labelled,
    command_parser,
    options_for_settings,
    trained_network_arguments,
)

SPLITS = ("train", "heldout", "kfold", "test")
# Super-class of each class, and the super-classes' names, of the data sets that have them.
SUPERCLASSES = {"cifar100": (SUPERCLASS, SUPERCLASS_NAMES)}
LEAK = (
    "groups from the test images leak the test set into training, so that accuracies on it are biased. "
    "Use --split test to compare with groups that were made this way, not to make new ones."
)
# With fewer errors than this for each class, the error rates are mostly chance.
ENOUGH_ERRORS = 10


def group_classes(
    model: str,
    ckpt: str,
    dataset: str,
    num_groups: int,
    out: Path,
    split: str = "train",
    single_classes: bool = False,
    val_fraction: float = 0.1,
    folds: int = 5,
    batch_size: int = 256,
    data_root: str | None = None,
    num_workers: int = 2,
    device: str = "auto",
    skip_broken: bool = False,
    distances: Path | None = None,
) -> str:
    """Group a data set's classes by a teacher's errors; write the groups to `out` (JSON) and a plot next to it (PNG).

    Args:
        ckpt: the teacher's checkpoint; "pretrain" is the published one.
        split: the images on which errors are counted. "train": the training images, not augmented. "heldout": those
            of the training set that DATASET.VAL_FRACTION `val_fraction` keeps out of training; the teacher must have
            been trained with that value. "kfold": the training images, by cross-validation of the teacher's last layer,
            see `cross_predict`. "test": the test images, which leaks them into training.
        single_classes: group the classes even if the data set has super-classes.
        distances: also write WKD's distances of the classes, see `class_distances`, to this .npy or .json file.

    Returns:
        Accuracy, errors and groups, for the terminal.

    Raises:
        UserError: an unknown name, missing data, a checkpoint that does not fit, or counts that give no groups.
    """
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    cfg = settings_for(dataset, data_root, model)
    info = info_of(cfg)
    check_labelled(info, dataset)
    superclass, names = SUPERCLASSES.get(dataset, (None, None))
    if single_classes or superclass is None:
        superclass, names = list(range(info.num_classes)), [str(c) for c in range(info.num_classes)]
    assert names is not None
    if not 1 <= num_groups <= len(names) // 2:
        raise UserError(f"--num-groups must be from 1 to {len(names) // 2} for {len(names)} classes, not {num_groups}")
    if split == "test":
        warn(LEAK)
    if distances is not None:
        check_suffix(distances)

    check_batch_size(batch_size)
    info = own_view(info, model, ckpt)
    teacher = load_trained(info, model, ckpt, device=device)
    loader = _loader(info, split, val_fraction, cfg.DATASET.ROOT, batch_size, num_workers, skip_broken)
    if ckpt != "pretrain":
        check_file_classes(ckpt, getattr(loader, "class_names", ()))
    loader.to(next(teacher.parameters()).device)
    if split == "kfold":
        features, targets = _run(teacher, loader, "pooled_feat")
        predictions = cross_predict(features, targets, folds)
    else:
        logits, targets = _run(teacher, loader, "logits")
        predictions = logits.argmax(dim=1)
    classes = count_confusions(targets.numpy(), predictions.numpy(), info.num_classes)
    confusion = merge_classes(classes, superclass)
    groups = group_by_confusion(confusion, num_groups)

    accuracy = 100 * np.trace(classes) / classes.sum()
    errors = int(confusion.sum() - np.trace(confusion))
    if errors < ENOUGH_ERRORS * len(names):
        warn(
            f"{errors} errors between {len(names)} classes are too few to trust the groups; count them on "
            "more images that the teacher was not trained on (--split heldout), or by cross-validation (--split kfold)"
        )
    content = {
        "groups": expand(groups, superclass),
        "superclass_groups": groups,
        "dataset": dataset,
        "teacher": model,
        "checkpoint": ckpt,
        "split": split,
        "val_fraction": val_fraction if split == "heldout" else None,
        "folds": folds if split == "kfold" else None,
        "images": int(classes.sum()),
        "accuracy": round(float(accuracy), 2),
        "errors_between_superclasses": errors,
        "date": datetime.date.today().isoformat(),
        "superclasses": names,
        "confusion": confusion.tolist(),
    }
    save_groups(out, content)
    if distances is not None:
        save_distances(distances, class_distances(*_run(teacher, loader, "pooled_feat")))
    plot = out.with_suffix(".png")
    draw_confusion(plot, confusion, groups, names, f"{model} on {dataset} ({split}), {num_groups} groups")
    lines = [f"{model} on {len(targets)} images of {dataset} ({split}): top-1 {accuracy:.2f}, {errors} errors counted"]
    lines += [f"group {g}: {', '.join(names[i] for i in group)}" for g, group in enumerate(groups)]
    lines += [f"wrote {out} and {plot}; train with DCGD.GROUPS {out}"]
    lines += [] if distances is None else [f"wrote {distances}; train with WKD.COST_MATRIX {distances}"]
    return "\n".join(lines)


def _loader(
    info: DatasetInfo, split: str, val_fraction: float, root: str, batch_size: int, num_workers: int, skip_broken: bool
) -> Loader:
    """The images of `split`, in order and not augmented."""
    if split != "heldout":
        return get_val_loader(info, root, batch_size, num_workers, split != "test", skip_broken)
    if not 0 < val_fraction < 1:
        raise UserError(f"--val-fraction must be between 0 and 1, not {val_fraction}")
    train = info.read(Path(root), True, skip_broken)
    _, held_out = stratified_split(train.targets, 1 - val_fraction)
    return train.select(held_out).loader(batch_size, num_workers, train=False)


def _run(model: nn.Module, loader: Iterable[Any], field: str) -> tuple[Tensor, Tensor]:
    """The model's logits, or a field of its features, for all images; and the targets. Both on the CPU."""
    device = next(model.parameters()).device
    outputs, targets = [], []
    with torch.inference_mode():
        for image, target in labelled(loader):
            logits, features = model(image.to(device))
            outputs.append((logits if field == "logits" else features[field]).cpu())
            targets.append(target.cpu())
    return torch.cat(outputs), torch.cat(targets)


def parse_args(arguments: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = command_parser(__doc__, prog)
    trained_network_arguments(parser, batch_size=256)
    parser.add_argument(
        "-o", "--out", action=PathArgument, type=Path, default=Path("groups.json"),
        help="JSON file; the PNG goes next to it",
    )  # fmt: skip
    parser.add_argument("--num-groups", type=int, default=5, help="at most half the number of classes (default: 5)")
    parser.add_argument(
        "--split", default="train",
        help="images to count errors on: train (default); heldout, for a teacher trained with DATASET.VAL_FRACTION; "
        "kfold, cross-validating its last layer on the training images; test, which leaks the test set",
    )  # fmt: skip
    parser.add_argument("--single-classes", action="store_true", help="group classes, not CIFAR-100's super-classes")
    parser.add_argument(
        "--val-fraction", type=float, default=0.1, help="for --split heldout: DATASET.VAL_FRACTION of the teacher's run"
    )
    parser.add_argument(
        "--class-distances", action=PathArgument, type=Path, dest="distances",
        help="also write how far the classes are apart in the teacher's features, for WKD.COST_MATRIX: .npy or .json",
    )  # fmt: skip
    parser.add_argument("--folds", type=int, default=5, help="for --split kfold: number of folds (default: 5)")
    return parser.parse_args(arguments)


@tool()
@options_for_settings()
def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    print(group_classes(**vars(parse_args(arguments, prog))))
