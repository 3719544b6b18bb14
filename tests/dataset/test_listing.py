"""Class folders: the classes and the labels of the files that a data set has, and what is refused or said."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from mdistiller.console import log_to_terminal
from mdistiller.dataset import dataset_dict, get_dataloaders
from mdistiller.dataset.folders import ImageFiles, class_folders, labelled_files
from mdistiller.dataset.image_file import read_pixels
from mdistiller.errors import UserError

IMAGENET = [f"n{i:08}" for i in range(20)]  # as if it had so few; with all 1,000: test_imagenets.py
TINY = [f"n{i:08}" for i in range(200)]
APPLE_DOUBLE = bytes.fromhex("00051607000200004d6163204f5320582020202020202020") + bytes(100)


@pytest.fixture(autouse=True)
def terminal() -> None:
    log_to_terminal()


def save(path: Path, size: int = 64) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (size, size), 9).save(path)


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def found(folder: Path, classes: list[str]) -> list[str]:
    """`class/file label` of every file."""
    return [f"{Path(path).relative_to(folder)} {label}" for path, label in labelled_files(folder, classes)]


# The files of a class


def test_hidden_files_and_folders_are_skipped_and_counted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hidden = (
        "a/._0.JPEG", "a/.DS_Store", "a/.ipynb_checkpoints/0-checkpoint.JPEG", "a/deep/.ipynb_checkpoints/0.png",
        "a/@eaDir/0.jpg", ".hidden/0.png", "__MACOSX/0.png",
    )  # fmt: skip
    touch(tmp_path / "a/0.JPEG", tmp_path / "a/deep/1.png", *(tmp_path / name for name in hidden))
    assert class_folders(tmp_path, 1) == ["a"]
    assert found(tmp_path, ["a"]) == ["a/0.JPEG 0", "a/deep/1.png 0"]
    said = f"note: {tmp_path}: passed over what is not read as an image: 7 hidden\n"
    assert capfd.readouterr().err == said


def test_other_files_are_counted_by_ending(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    touch(*(tmp_path / "a" / name for name in ("0.png", "1.HEIC", "2.heic", "boxes.txt", "3.eps", "noending")))
    assert found(tmp_path, ["a"]) == ["a/0.png 0"]
    said = "passed over what is not read as an image: 2 .heic, "
    err = capfd.readouterr().err
    assert err.startswith(f"warning: {tmp_path}: {said}") and err.count("\n") == 1
    assert all(f"1 {kind}" in err for kind in (".txt", ".eps", "without an ending"))


def test_everyday_files_are_only_noted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    touch(*(tmp_path / "a" / name for name in ("0.png", "Thumbs.db", "desktop.ini", "a_boxes.txt", ".DS_Store")))
    labelled_files(tmp_path, ["a"])
    err = capfd.readouterr().err
    assert err.startswith("note: ") and err.count("\n") == 1
    assert sorted(err[err.rindex(": ") + 2 :].strip().split(", ")) == ["1 .db", "1 .ini", "1 .txt", "1 hidden"]


def test_files_of_unread_formats_alone_are_no_class(tmp_path: Path) -> None:
    touch(tmp_path / "a/0.heic", tmp_path / "a/1.heic", tmp_path / "2.png")
    with pytest.raises(UserError, match=r"no image in the class folders of .*; 2 \.heic, 1 \.png lie elsewhere"):
        labelled_files(tmp_path, ["a"])


def test_loose_images_and_other_folders_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path / "a/0.png", tmp_path / "b/0.png", tmp_path / "1.png")
    assert found(tmp_path, ["a"]) == ["a/0.png 0"]
    assert capfd.readouterr().err.splitlines() == [
        f"warning: {tmp_path}: 1 folder (b) not in the list of classes left out",
        f"warning: {tmp_path}: 1 image (1.png) in no class folder left out",
    ]


def test_a_class_without_a_folder_is_refused_and_one_without_an_image_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    touch(tmp_path / "b/0.png")
    for name in "acde":
        (tmp_path / name).mkdir()
    assert found(tmp_path, [*"abcde"]) == ["b/0.png 1"]
    assert capfd.readouterr().err == f"warning: {tmp_path} has no image of 4 classes (a, c, d, ...)\n"
    with pytest.raises(UserError, match=r"lacks the folders of 2 classes \(x, y\)"):
        labelled_files(tmp_path, [*"abxy"])


# Links


def test_linked_folders_are_followed(tmp_path: Path) -> None:
    train, store = tmp_path / "train", tmp_path / "store"
    touch(train / "a/0.png", store / "a/2.png", store / "b/1.png", store / "b/deep/3.png", store / "one.png")
    (train / "a" / "images").symlink_to(store / "a")
    (train / "a" / "more").symlink_to("../../store/a")  # the same folder in two places is no loop
    (train / "a" / "one.png").symlink_to(store / "one.png")
    (train / "b").symlink_to(store / "b")
    expected = ["a/0.png 0", "a/one.png 0", "a/images/2.png 0", "a/more/2.png 0", "b/1.png 1", "b/deep/3.png 1"]
    assert class_folders(train, 2) == ["a", "b"] and found(train, ["a", "b"]) == expected
    (tmp_path / "linked").symlink_to(train)
    assert found(tmp_path / "linked", ["a", "b"]) == expected


LOOPS = {
    "itself": ("a/self", "."),
    "the class folder, from below": ("a/deep/up", ".."),
    "the split": ("a/up", ".."),
    "the folder that holds the split": ("a/up", "../.."),
    "the root": ("a/up", "/"),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_loops_are_cut_and_named(loop: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train = tmp_path / "train"
    touch(train / "a/0.png", train / "a/deep/1.png", train / "b/2.png")
    link, target = LOOPS[loop]
    (train / link).symlink_to(target)
    assert found(train, ["a", "b"]) == ["a/0.png 0", "a/deep/1.png 0", "b/2.png 1"]
    said = f"warning: not followed, because it leads back to a folder that it lies in: 1 link ({train / link})\n"
    assert capfd.readouterr().err == said


def test_loops_in_linked_folders_are_cut(tmp_path: Path) -> None:
    train, store = tmp_path / "train", tmp_path / "store"
    touch(store / "a/0.png", store / "other/1.png")
    train.mkdir()
    (train / "a").symlink_to(store / "a")
    (store / "a" / "up").symlink_to("..")  # to store, which lies in no folder of train
    assert found(train, ["a"]) == ["a/0.png 0"]
    (store / "a" / "up").unlink()
    (store / "a" / "other").symlink_to(store / "other")
    (store / "other" / "back").symlink_to(store / "a")
    assert found(train, ["a"]) == ["a/0.png 0", "a/other/1.png 0"]


def test_two_classes_that_link_to_each_other(tmp_path: Path) -> None:
    touch(tmp_path / "a/0.png", tmp_path / "b/1.png")
    (tmp_path / "a" / "b").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "a").symlink_to(tmp_path / "a")
    assert found(tmp_path, ["a", "b"]) == ["a/0.png 0", "a/b/1.png 0", "b/1.png 1", "b/a/0.png 1"]


@pytest.mark.parametrize("place", ["a/images", "c"])
@pytest.mark.parametrize("target", ["gone", "images", "c"])  # the latter two: perhaps to itself
def test_a_broken_link_is_named(place: str, target: str, tmp_path: Path) -> None:
    touch(tmp_path / "a/0.png")
    (tmp_path / place).symlink_to(target)
    said = f"cannot read {tmp_path / place}, a link to {target}: .*; repair it or remove it"
    with pytest.raises(UserError, match=said):
        labelled_files(tmp_path, class_folders(tmp_path, 1))


def test_a_broken_link_of_an_image_is_a_broken_image(tmp_path: Path) -> None:
    touch(tmp_path / "a/0.png")
    (tmp_path / "a/1.png").symlink_to("gone")
    (tmp_path / "a/2.png").symlink_to("2.png")
    assert found(tmp_path, ["a"]) == ["a/0.png 0", "a/1.png 0", "a/2.png 0"]
    with pytest.raises(UserError, match=r"1\.png cannot be read as an image .*No such file"):
        read_pixels(str(tmp_path / "a/1.png"))


@contextmanager
def without_rights(folder: Path) -> Iterator[None]:
    """Nobody's rights, if this is root, and none to read `folder`."""
    folder.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(stat.S_IRWXU)


@pytest.mark.parametrize("locked", ["", "a", "a/images"])
def test_a_folder_that_cannot_be_read_is_named(locked: str) -> None:
    with tempfile.TemporaryDirectory() as name:  # tmp_path lies in a folder of this user alone
        root = Path(name)
        root.chmod(0o755)
        touch(root / "train/a/images/0.png")
        folder = root / "train" / locked
        with without_rights(folder), pytest.raises(UserError, match=f"cannot read {folder}: Permission denied; "):
            labelled_files(root / "train", class_folders(root / "train", 1))


# The list of classes


def test_a_wrong_number_names_what_is_unlike_the_others(tmp_path: Path) -> None:
    touch(*(tmp_path / name / "0.png" for name in ("n01", "n02", "n03", "backup")), tmp_path / "n04.tar")
    with pytest.raises(UserError) as refused:
        class_folders(tmp_path, 3)
    assert str(refused.value) == (
        f"{tmp_path} has 4 class folders, expected 3 (empty folders count too); unlike the others: 1 name (backup); "
        "outside of class folders lie 1 .tar: each belongs in the folder of its class"
    )


@pytest.fixture
def imagenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """imagenet/{train,val} with 20 class folders, two images in each of three; returns the folder imagenet."""
    monkeypatch.setattr("mdistiller.dataset.imagenet.NUM_CLASSES", 20)
    monkeypatch.setattr("mdistiller.dataset.imagenet.IMAGES", {"train": 26_000, "val": 1000})
    home = tmp_path / "imagenet"
    for part in ("train", "val"):
        for name in IMAGENET:
            (home / part / name).mkdir(parents=True)
        for place in (0, 10, 19):
            touch(home / part / IMAGENET[place] / f"{part}_{place}.JPEG", home / part / IMAGENET[place] / "b.png")
    return home


def labels(home: Path, kind: str, train: bool, by_skipping: bool = False) -> dict[str, set[int]]:
    """The labels of each file name."""
    split = dataset_dict[kind].read(home.parent, train, by_skipping)
    names: dict[str, set[int]] = {}
    for path, label in zip(split.paths, split.targets.tolist()):
        names.setdefault(Path(path.decode()).name, set()).add(label)
    return names


def refusal(home: Path, kind: str, train: bool) -> str:
    with pytest.raises(UserError) as refused:
        dataset_dict[kind].read(home.parent, train)
    assert "\n" not in str(refused.value)
    return str(refused.value)


EXPECTED = {"b.png": {0, 10, 19}}


@pytest.mark.parametrize("train", [True, False])
def test_imagenet_labels_by_file_name(imagenet: Path, train: bool) -> None:
    part = "train" if train else "val"
    expected = {f"{part}_{place}.JPEG": {place} for place in (0, 10, 19)} | EXPECTED
    assert labels(imagenet, "imagenet", train) == expected
    for other in ("train", "val"):
        (imagenet / other / ".ipynb_checkpoints").mkdir()
        touch(imagenet / other / IMAGENET[0] / f"._{other}_0.JPEG")
    assert labels(imagenet, "imagenet", train) == expected


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("part", ["train", "val"])
def test_class_folders_that_only_one_split_has_are_named(imagenet: Path, train: bool, part: str) -> None:
    (imagenet / part / IMAGENET[7]).rename(imagenet / part / "a_class")
    message = refusal(imagenet, "imagenet", train)
    lacks, other = ((IMAGENET[7], "a_class") if part == "val" else ("a_class", IMAGENET[7]))
    assert f"it lacks 1 class ({lacks}), 1 folder ({other}) too many" in message
    assert str(imagenet / "val") in message and str(imagenet / "train") in message


def test_a_hidden_folder_does_not_stand_in_for_a_class(imagenet: Path) -> None:
    (imagenet / "val" / IMAGENET[7]).rename(imagenet / "val" / ".ipynb_checkpoints")
    assert f"it lacks 1 class ({IMAGENET[7]});" in refusal(imagenet, "imagenet", False)


def test_many_missing_class_folders_are_counted(imagenet: Path) -> None:
    for name in IMAGENET[2:14]:
        shutil.rmtree(imagenet / "val" / name)
    assert f"lacks 12 classes ({', '.join(IMAGENET[2:5])}, ...)" in refusal(imagenet, "imagenet", True)


@pytest.mark.parametrize("emptied", ["train", "val"])
@pytest.mark.parametrize("train", [True, False])
def test_a_class_with_images_in_one_split_only_is_refused(imagenet: Path, emptied: str, train: bool) -> None:
    for path in (imagenet / emptied / IMAGENET[10]).iterdir():
        path.rename(path.with_suffix(".heic"))
    said = f"{imagenet / emptied} has no image of 1 class ({IMAGENET[10]}) of which"
    assert refusal(imagenet, "imagenet", train).startswith(said)


def test_a_validation_set_of_which_images_are_left_beside_the_class_folders(imagenet: Path) -> None:
    touch(imagenet / "val" / "ILSVRC2012_val_00000001.JPEG")
    said = "1 image (ILSVRC2012_val_00000001.JPEG); move each to the folder of its class"
    assert said in refusal(imagenet, "imagenet", False)
    shutil.copy(imagenet / "val" / "ILSVRC2012_val_00000001.JPEG", imagenet / "val" / IMAGENET[0])
    assert labels(imagenet, "imagenet", False)["ILSVRC2012_val_00000001.JPEG"] == {0}


def test_a_flat_validation_set_is_refused_and_no_obstacle_for_training(imagenet: Path) -> None:
    shutil.rmtree(imagenet / "val")
    touch(*(imagenet / "val" / f"ILSVRC2012_val_{i:08}.JPEG" for i in range(5)))
    assert len(labels(imagenet, "imagenet", True)) == 4
    assert "; 5 .jpeg lie elsewhere" in refusal(imagenet, "imagenet", False)
    shutil.rmtree(imagenet / "train")
    assert "5 .jpeg" in refusal(imagenet, "imagenet", False)


def test_a_class_with_a_part_of_its_validation_images(imagenet: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for place, count in ((0, 50), (10, 49), (19, 50)):
        shutil.rmtree(imagenet / "val" / IMAGENET[place])
        touch(*(imagenet / "val" / IMAGENET[place] / f"{i}.JPEG" for i in range(count)))
    said = f"has fewer than 50 images of 18 classes ({IMAGENET[1]}: 0, {IMAGENET[2]}: 0, {IMAGENET[3]}: 0, ...)"
    assert said in refusal(imagenet, "imagenet", False)
    for place in (0, 10, 19):
        (imagenet / "val" / IMAGENET[place] / "49.JPEG").unlink(missing_ok=True)
    labels(imagenet, "imagenet", False)  # as many of each class: a choice
    assert f"{imagenet / 'val'} has 147 images, where the published data set has 1000" in capfd.readouterr().err


def test_a_split_that_is_a_broken_link_is_named(imagenet: Path) -> None:
    shutil.rmtree(imagenet / "val")
    (imagenet / "val").symlink_to("/gone/val")
    assert f"{imagenet / 'val'}, a link to /gone/val, which is not there" in refusal(imagenet, "imagenet", False)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """tiny-imagenet-200 in the layout of its zip, with images of three classes; returns the folder itself."""
    home = tmp_path / "tiny-imagenet-200"
    for wnid in TINY:
        touch(home / "train" / wnid / f"{wnid}_boxes.txt")
        (home / "train" / wnid / "images").mkdir()
    (home / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in reversed(TINY)))
    rows = []
    for place in (3, 100, 199):
        save(home / "train" / TINY[place] / "images" / f"{TINY[place]}_0.JPEG")
        save(home / "val" / "images" / f"val_{place}.JPEG")
        rows.append(f"val_{place}.JPEG\t{TINY[place]}\t0\t0\t9\t9\n")
    (home / "val" / "val_annotations.txt").write_text("".join(rows))
    return home


def targets(home: Path, train: bool) -> list[int]:
    return dataset_dict["tiny_imagenet"].read(home.parent, train).targets.tolist()


def into_class_folders(home: Path) -> None:
    """Move the validation images as the scripts do that people pass around."""
    for wnid in TINY:
        (home / "val" / wnid / "images").mkdir(parents=True)
    for place in (3, 100, 199):
        (home / "val/images" / f"val_{place}.JPEG").rename(home / "val" / TINY[place] / "images" / f"val_{place}.JPEG")


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("in_folders", [True, False])
def test_tiny_labels(tiny: Path, listed: bool, in_folders: bool) -> None:
    if in_folders:
        into_class_folders(tiny)
    if not listed:
        (tiny / "wnids.txt").unlink()
    (tiny / "train" / ".ipynb_checkpoints").mkdir()
    assert targets(tiny, True) == targets(tiny, False) == [3, 100, 199]


@pytest.mark.parametrize("train", [True, False])
def test_tiny_half_unzipped(tiny: Path, train: bool) -> None:
    for wnid in TINY[120:]:
        shutil.rmtree(tiny / "train" / wnid)
    said = f"are not the classes of {tiny / 'wnids.txt'}: it lacks 80 classes ({', '.join(TINY[120:123])}, ...)"
    assert said in refusal(tiny, "tiny_imagenet", train)
    (tiny / "wnids.txt").unlink()
    assert "train has 120 class folders, expected 200" in refusal(tiny, "tiny_imagenet", train)


@pytest.mark.parametrize("train", [True, False])
def test_tiny_folders_that_the_list_does_not_name(tiny: Path, train: bool) -> None:
    (tiny / "train" / "n99999999").mkdir()
    assert "1 folder (n99999999) too many" in refusal(tiny, "tiny_imagenet", train)


@pytest.mark.parametrize("train", [True, False])
def test_tiny_class_folders_of_val_that_are_not_those_of_train(tiny: Path, train: bool) -> None:
    into_class_folders(tiny)
    (tiny / "val" / TINY[7]).rename(tiny / "val" / "cat")
    assert f"it lacks 1 class ({TINY[7]}), 1 folder (cat) too many" in refusal(tiny, "tiny_imagenet", train)


def test_tiny_val_whose_images_are_moved_in_part(tiny: Path) -> None:
    into_class_folders(tiny)
    save(tiny / "val" / "images" / "val_7.JPEG")
    assert f"in no class folder of {tiny / 'val'}: 1 image (val_7.JPEG)" in refusal(tiny, "tiny_imagenet", False)
    (tiny / "val" / "images" / "val_7.JPEG").unlink()
    (tiny / "val" / TINY[3] / "images" / "val_3.JPEG").unlink()
    assert f"val has no image of 1 class ({TINY[3]})" in refusal(tiny, "tiny_imagenet", False)


@pytest.mark.parametrize("train", [True, False])
def test_tiny_train_without_an_image_of_a_validated_class(tiny: Path, train: bool) -> None:
    shutil.rmtree(tiny / "train" / TINY[100] / "images")
    assert f"train has no image of 1 class ({TINY[100]}) of which" in refusal(tiny, "tiny_imagenet", train)


def test_tiny_annotations_that_do_not_fit_the_images(tiny: Path) -> None:
    rows = (tiny / "val" / "val_annotations.txt").read_text().splitlines()
    save(tiny / "val" / "images" / "val_5.JPEG")
    (tiny / "val" / "images" / "val_100.JPEG").unlink()
    touch(tiny / "val" / "images" / "._val_3.JPEG")
    (tiny / "val" / "val_annotations.txt").write_text("\n".join([*rows, rows[0]]))
    message = refusal(tiny, "tiny_imagenet", False)
    assert "1 image (val_100.JPEG) not on the disk, 1 image (val_5.JPEG) on the disk but not listed" in message
    assert "1 image (val_3.JPEG) listed twice" in message
    with pytest.raises(UserError, match="not on the disk"):  # what is not there is not broken
        dataset_dict["tiny_imagenet"].read(tiny.parent, False, True)


def test_tiny_annotations_of_some_classes_are_a_choice(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = (tiny / "val" / "val_annotations.txt").read_text().splitlines()
    (tiny / "val" / "val_annotations.txt").write_text(rows[0] + "\n\n")
    for place in (100, 199):
        (tiny / "val" / "images" / f"val_{place}.JPEG").unlink()
    assert targets(tiny, False) == [3] and targets(tiny, True) == [3, 100, 199]
    assert f"{tiny / 'val'} has 1 images, where the published data set has 10000" in capfd.readouterr().err


@pytest.mark.parametrize("file", ["wnids.txt", "val/val_annotations.txt"])
def test_tiny_lists_with_a_mark_and_windows_line_ends(tiny: Path, file: str) -> None:
    text = (tiny / file).read_text()
    (tiny / file).write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))
    assert targets(tiny, True) == targets(tiny, False) == [3, 100, 199]
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        (tiny / file).write_bytes(text.encode(encoding))
        message = refusal(tiny, "tiny_imagenet", False)
        assert f"{tiny / file} is not in UTF-8" in message and "UTF-16" in message and "save it in UTF-8" in message


def test_tiny_short_list_names_what_comes_twice(tiny: Path) -> None:
    (tiny / "wnids.txt").write_text("\n".join([*TINY[1:], TINY[5]]))
    said = f"lists 199 classes, expected 200, and 1 name ({TINY[5]}) more than once"
    assert said in refusal(tiny, "tiny_imagenet", True)


# Data sets of users


def test_a_data_set_of_a_user_whose_splits_have_other_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each split lists its own folders, as many in both."""
    for part, names in (("train", "abc"), ("val", "abd")):
        for name in names:
            save(tmp_path / part / name / "0.png", 8)
            save(tmp_path / part / name / "1.png", 8)

    def read(root: Path, train: bool, skip_broken: bool = False) -> ImageFiles:
        folder = root / ("train" if train else "val")
        files = labelled_files(folder, class_folders(folder, 3))
        return ImageFiles.of(files, read_pixels, read_pixels, (0,) * 3, (1,) * 3)

    info = dataset_dict["digits"]
    monkeypatch.setitem(dataset_dict, "users", type(info)(3, 8, "cifar", read))
    with pytest.raises(UserError, match=r"3 and 3 classes, 1 labels differently: label 2 is 'c' and 'd'; give both"):
        get_dataloaders("users", 2, 2, 0, str(tmp_path))
    (tmp_path / "val" / "d").rename(tmp_path / "val" / "c")
    train, val, _ = get_dataloaders("users", 2, 2, 0, str(tmp_path))
    assert train.class_names == val.class_names == ("a", "b", "c")
