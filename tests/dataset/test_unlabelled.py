"""DATASET.TYPE images: which images are read, and that no label is made up for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from mdistiller.dataset import ImageArray, get_dataset, info_of, stratified_split
from mdistiller.engine.cfg import settings_for
from mdistiller.errors import UserError


def fill(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (number, 0, 0)).save(root / name)
    return root


def settings(root: Path, *overrides: object):
    cfg = settings_for("images", str(root), "resnet20")
    cfg.defrost()
    cfg.merge_from_list(["DATASET.NUM_WORKERS", 0, "SOLVER.BATCH_SIZE", 2, *overrides])
    cfg.freeze()
    return cfg


def first_channel(loader) -> set[int]:
    """The images, by their number; read without augmentation."""
    return {int(value) for value in loader._images[:, 20, 20, 0]}


def test_a_nested_folder_with_a_part_held_out(tmp_path: Path) -> None:
    root = fill(tmp_path, *(f"{'deep/er/' if i % 2 else ''}{i}.png" for i in range(10)), ".hidden/0.png")
    train, val, count, classes = get_dataset(settings(root, "DATASET.VAL_FRACTION", 0.2, "DATASET.NUM_CLASSES", 7))
    assert (count, len(val.targets), classes) == (8, 2, 7)
    assert first_channel(train) | first_channel(val) == set(range(10)) and not train.labelled and not val.labelled
    batch = next(iter(train))
    assert batch[1].tolist() == [-1, -1] and train.class_names == ()


def test_named_validation_images_are_never_trained_on(tmp_path: Path) -> None:
    root = fill(tmp_path, "0.png", "a/1.png", "val/2.png", "val/b/3.png")
    train, val, *_ = get_dataset(settings(root, "DATASET.VAL", "val"))
    assert first_channel(train) == {0, 1} and first_channel(val) == {2, 3}
    train, val, *_ = get_dataset(settings(root, "DATASET.VAL", str(tmp_path / "val"), "DATASET.TRAIN", "."))
    assert first_channel(train) == {0, 1}


def test_a_link_to_the_validation_images_is_not_trained_on(tmp_path: Path) -> None:
    root = fill(tmp_path / "root", "0.png", "1.png")
    fill(tmp_path / "val", "2.png", "3.png")
    (root / "link").symlink_to(tmp_path / "val")
    train, *_ = get_dataset(settings(root, "DATASET.VAL", str(tmp_path / "val")))
    assert len(train.targets) == 2


@pytest.mark.parametrize(
    "overrides, message",
    [
        ((), "which of the images in .* are for validation. set DATASET.VAL_FRACTION, such as 0.1"),
        (("DATASET.ROOT", "/none"), "a folder of images is expected in /none: set DATASET.ROOT to it"),
        (("DATASET.VAL", "nowhere"), "DATASET.VAL nowhere is no folder"),
        (("DATASET.VAL", "."), r"all images of .* lie in DATASET.VAL \.; set another"),
        (("DATASET.VAL", "empty"), "no image in .*/empty; 1 .txt are not read as images"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, overrides: tuple, message: str) -> None:
    root = fill(tmp_path, "0.png", "1.png", "2.png")
    (root / "empty").mkdir()
    (root / "empty" / "notes.txt").touch()
    with pytest.raises(UserError, match=message):
        get_dataset(settings(root, *overrides))


def test_large_images_are_read_from_files_too(tmp_path: Path) -> None:
    root = fill(tmp_path, *(f"{i}.png" for i in range(6)))
    train, val, *_ = get_dataset(settings(root, "DATASET.IMAGE_SIZE", 72, "DATASET.VAL_FRACTION", 0.34))
    assert next(iter(train))[0].shape == (2, 3, 72, 72) and not train.labelled and len(val.targets) == 2


def test_its_facts_need_no_file() -> None:
    info = info_of(settings(Path("/none"), "DATASET.NUM_CLASSES", 5))
    assert (info.num_classes, info.labelled, info.image_size) == (5, False, 32)


def test_images_of_which_some_have_no_label_are_refused() -> None:
    images = torch.zeros(4, 8, 8, 3, dtype=torch.uint8)
    with pytest.raises(UserError, match=r"go from -1 to 1.*leave out the images without a label"):
        ImageArray(images, torch.tensor([-1, 0, 1, 0]), (0.5,) * 3, (0.5,) * 3).loader(2, 0, train=True)


def test_a_part_of_images_without_labels_is_one_of_all_of_them() -> None:
    chosen, rest = stratified_split(torch.full((50,), -1), 0.2)
    assert (len(chosen), len(rest)) == (10, 40)
