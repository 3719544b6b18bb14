"""DATASET.TYPE folder: which folders are read, in which order of classes, and how the images are seen."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mdistiller.console import log_to_terminal
from mdistiller.dataset import ImageArray, get_dataset, get_val_loader, info_of
from mdistiller.dataset.folder import ClassFolders, Parts, in_label_order
from mdistiller.dataset.folders import ImageFiles
from mdistiller.dataset.held import Held, fits
from mdistiller.dataset.in_memory import Normalize
from mdistiller.dataset.views import ValView, input_of, resized_size, upright
from mdistiller.engine.build import facts_without_data, resolved
from mdistiller.engine.cfg import CFG, elsewhere, load_cfg, settings_for
from mdistiller.errors import UserError
from mdistiller.models.native import NativeInput

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def terminal() -> None:
    log_to_terminal()


def save(path: Path, seed: int = 0, size: tuple[int, int] = (40, 36)) -> Path:
    """An image of smooth colours, of `size` (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def fill(root: Path, *folders: str, images: int = 3) -> Path:
    for number, folder in enumerate(folders):
        for image in range(images):
            save(root / folder / f"{image}.png", 10 * number + image)
    return root


def settings(root: Path, *overrides: object, model: str = "resnet20"):
    cfg = settings_for("folder", str(root), model)
    cfg.defrost()
    cfg.merge_from_list(list(overrides))
    cfg.SOLVER.BATCH_SIZE, cfg.DATASET.NUM_WORKERS = 4, 0
    cfg.freeze()
    return cfg


def names(cfg) -> tuple[list[str], list[str]]:
    """The folders of the training and of the validation images."""
    parts = Parts.of(Path(cfg.DATASET.ROOT), cfg)
    return [str(part.relative_to(parts.root)) if part else "" for part in (parts.train, parts.val)]


# Which folders


@pytest.mark.parametrize("val", ["val", "test"])
def test_train_and_val_or_test(tmp_path: Path, val: str) -> None:
    cfg = settings(fill(tmp_path, "train/a", "train/b", f"{val}/a", f"{val}/b"))
    train, held_out, count, classes = get_dataset(cfg)
    assert (count, classes, train.class_names) == (6, 2, ("a", "b"))
    assert held_out.targets.tolist() == [0, 0, 0, 1, 1, 1] and held_out.class_names == ("a", "b")
    assert info_of(cfg).image_size == 32 and next(iter(train))[0].shape == (4, 3, 32, 32)


def test_val_comes_before_test(tmp_path: Path) -> None:
    assert names(settings(fill(tmp_path, "train/a", "val/a", "test/a"))) == ["train", "val"]


def test_class_folders_alone_need_a_part_to_hold_out(tmp_path: Path) -> None:
    root = fill(tmp_path, "a", "b", images=10)
    with pytest.raises(UserError, match=r"no validation images, .*/val or .*/test: set DATASET.VAL_FRACTION, such as"):
        get_dataset(settings(root))
    train, val, count, _ = get_dataset(settings(root, "DATASET.VAL_FRACTION", 0.2))
    assert count == 16 and val.targets.tolist() == [0, 0, 1, 1] and train.class_names == ("a", "b")


def test_folders_named_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fill(tmp_path / "one", "x/a", "x/b", "train/c")
    fill(tmp_path / "home" / "two", "a", "b", images=2)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = tmp_path / "run.yaml"
    path.write_text(f"DATASET: {{TYPE: folder, ROOT: {root}, TRAIN: x, VAL: ~/two}}\n")
    train, val, *_ = get_dataset(load_cfg(path, ["DATASET.NUM_WORKERS", "0", "SOLVER.BATCH_SIZE", "2"]))
    assert (len(train.targets), len(val.targets), val.class_names) == (6, 4, ("a", "b"))


def test_training_images_named_val_are_not_those_of_validation(tmp_path: Path) -> None:
    cfg = settings(fill(tmp_path, "val/a", "val/b", images=4), "DATASET.TRAIN", "val", "DATASET.VAL_FRACTION", 0.25)
    assert names(cfg) == ["val", ""] and [len(loader.targets) for loader in get_dataset(cfg)[:2]] == [6, 2]


def test_validation_images_within_the_root_are_no_class(tmp_path: Path) -> None:
    cfg = settings(fill(tmp_path, "a", "b", "aside/a", "aside/b"), "DATASET.VAL", "aside")
    assert names(cfg) == [".", "aside"] and get_dataset(cfg)[0].class_names == ("a", "b")


def test_a_class_named_train_is_a_class(tmp_path: Path) -> None:
    cfg = settings(fill(tmp_path, "train", "bus", "car", images=4), "DATASET.VAL_FRACTION", 0.25)
    assert get_dataset(cfg)[0].class_names == ("bus", "car", "train")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (("DATASET.ROOT", "/none"), "expected in /none: set DATASET.ROOT"),
        (("DATASET.TRAIN", "nowhere"), "DATASET.TRAIN nowhere is no folder: there is no "),
        (("DATASET.VAL", "train"), "DATASET.TRAIN and DATASET.VAL are both .*/train; set DATASET.VAL_FRACTION"),
        (("DATASET.NUM_CLASSES", 3), "train has 2 class folders, but DATASET.NUM_CLASSES is 3"),
        (("DATASET.MEAN", [0.5, 0.5, 0.5]), "without DATASET.STD: set both"),
        (("DATASET.MEAN", [0.5], "DATASET.STD", [0.5]), r"DATASET.MEAN \[0.5\] has 1 numbers; give three"),
        (("DATASET.MEAN", [0.5] * 3, "DATASET.STD", [0.5, 0.0, 0.5]), "DATASET.STD .* must be above 0"),
        (("DATASET.MEAN", [123.7] * 3, "DATASET.STD", [0.5] * 3), "DATASET.MEAN .* divide those of 0 to 255 by 255"),
        (("DATASET.LABEL_COLUMN", "y"), "DATASET.LABEL_COLUMN y has no effect on DATASET.TYPE folder"),
        (("DISTILLER.STUDENT", "resnet21"), "resnet20"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path, overrides: tuple, message: str) -> None:
    root = fill(tmp_path, "train/a", "train/b", "val/a", "val/b", images=2)
    with pytest.raises(UserError, match=message) as error:
        get_dataset(settings(root, *overrides))
    assert "\n" not in str(error.value)


def test_a_root_without_class_folders(tmp_path: Path) -> None:
    save(tmp_path / "0.png")
    with pytest.raises(UserError, match=r"has no class folders, one for each class; outside of class folders lie 1 \."):
        info_of(settings(tmp_path))


@pytest.mark.parametrize("key, value", [("IMAGE_SIZE", 64), ("TRAIN", "train"), ("MEAN", [0.1] * 3)])
def test_a_setting_that_a_fixed_data_set_ignores_is_refused(key: str, value: object) -> None:
    cfg = CFG.clone()
    cfg.DATASET[key] = value
    with pytest.raises(UserError, match=f"DATASET.{key} .* has no effect on DATASET.TYPE cifar100"):
        info_of(cfg)


# Which classes


def test_the_class_that_one_side_lacks_is_named(tmp_path: Path) -> None:
    root = fill(tmp_path, "train/a", "train/b", "val/a")
    with pytest.raises(UserError, match=r"val are not the classes of .*train: it lacks 1 class \(b\)"):
        info_of(settings(root))
    (root / "val" / "b").mkdir()
    with pytest.raises(UserError, match=r"val has no image of 1 class \(b\) of which .*train has some"):
        get_dataset(settings(root))


def test_numbers_are_in_their_order_and_the_mapping_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = fill(tmp_path, *(f"{part}/{name}" for part in ("train", "val") for name in range(1, 13)), images=1)
    train, val, *_ = get_dataset(settings(root))
    assert train.class_names == val.class_names == tuple(map(str, range(1, 13)))
    said = "train: 12 classes, by label: 0 1, 1 2, 2 3, 3 4, ..., 11 12 (by value; torchvision's ImageFolder sorts"
    assert said in capfd.readouterr().err


@pytest.mark.parametrize(
    "given, ordered",
    [
        (["10", "9", "1"], ["1", "9", "10"]),
        (["02", "1", "10", "2"], ["1", "02", "2", "10"]),
        (["10", "9", "x"], ["10", "9", "x"]),
        (["b", "B", "a"], ["B", "a", "b"]),
        (["²", "1"], ["1", "²"]),
    ],
)
def test_the_order_of_labels(given: list[str], ordered: list[str]) -> None:
    assert in_label_order(given) == ordered


def test_hidden_files_and_folders_are_ignored(tmp_path: Path) -> None:
    root = fill(tmp_path, "train/a", "val/a", "train/.hidden", ".git/x", "val/a/.thumbs")
    save(root / "train" / "a" / "._0.png")
    train, val, *_ = get_dataset(settings(root))
    assert (len(train.targets), len(val.targets), train.class_names) == (3, 3, ("a",))


# The facts without the files


def test_facts_are_told_without_files_once_they_are_settings(tmp_path: Path) -> None:
    cfg = resolved(settings(fill(tmp_path / "data", "train/a", "train/b", "val/a", "val/b"), model="ResNet18"))
    assert (cfg.DATASET.NUM_CLASSES, cfg.DATASET.IMAGE_SIZE) == (2, 224)
    away = elsewhere(cfg, str(tmp_path / "gone"))
    facts = facts_without_data(away)
    assert (facts.num_classes, facts.image_size, facts.mean) == (2, 224, (0.485, 0.456, 0.406))


def test_size_and_normalisation_are_the_students_or_the_settings(tmp_path: Path) -> None:
    root = fill(tmp_path, "train/a", "val/a")
    own = info_of(settings(root, model="ResNet18"))
    assert (own.image_size, own.mean, own.std) == (224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    chosen = settings(root, "DATASET.IMAGE_SIZE", 48, "DATASET.MEAN", [0.1, 0.2, 0.3], "DATASET.STD", [0.5, 0.5, 1])
    _, val, *_ = get_dataset(chosen)
    image = next(iter(val))[0][0]
    view = ValView(input_of(chosen))(str(root / "val" / "a" / "0.png"))
    assert torch.equal(image, Normalize((0.1, 0.2, 0.3), (0.5, 0.5, 1), 48 * 48)(view[None])[0])
    at = info_of(chosen).at
    assert at is not None and at(NativeInput(20, (0.5,) * 3, (0.5,) * 3)).image_size == 20


# The images as they are seen


def modes(folder: Path) -> dict[str, Path]:
    """The same picture in every mode, by name."""
    rgb = Image.open(save(folder / "rgb.png", size=(60, 50))).convert("RGB")
    grey = np.asarray(rgb.convert("L"))
    made = {
        "rgb": rgb, "grey": rgb.convert("L"), "palette": rgb.convert("P"), "alpha": rgb.convert("RGBA"),
        "grey16": Image.fromarray(grey.astype(np.uint16) * 257), "cmyk": rgb.convert("CMYK"), "bits": rgb.convert("1"),
        "greyalpha": rgb.convert("LA"),
    }  # fmt: skip
    for name, image in made.items():
        image.save(folder / f"{name}{'.tif' if name == 'cmyk' else '.png'}")
    return {path.stem: path for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("size", [32, 96])
def test_every_mode_gives_an_image_of_three_channels(tmp_path: Path, size: int) -> None:
    for part in ("train", "val"):
        found = modes(tmp_path / part / "a")
    cfg = settings(tmp_path, "DATASET.IMAGE_SIZE", size)
    train, val, count, _ = get_dataset(cfg)
    assert count == len(found) == 8
    images = torch.cat([batch[0] for batch in val])
    assert images.shape == (8, 3, size, size)
    by_name = dict(zip(found, images))
    for near in ("alpha", "cmyk"):
        assert (by_name[near] - by_name["rgb"]).abs().max() < 0.1, near
    assert (by_name["grey16"] - by_name["grey"]).abs().max() < 0.05
    assert all(batch[0].isfinite().all() for batch in train)


def test_images_are_turned_as_their_exif_block_says(tmp_path: Path) -> None:
    image = Image.open(save(tmp_path / "as_it_is.png", size=(64, 48))).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    view = ValView(NativeInput(32, (0.5,) * 3, (0.5,) * 3))
    assert torch.equal(view(str(tmp_path / "turned.png")), view(str(tmp_path / "as_it_is.png")))


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_efficientnet_lite2", "resnet18.a1_in1k"])
@pytest.mark.parametrize("size", [(500, 375), (37, 91), (300, 301)])
def test_validation_sees_what_timm_does(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    timm = pytest.importorskip("timm")
    path = save(tmp_path / "0.png", size=size)
    cfg = settings(tmp_path, model=f"timm/{name}")
    theirs = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    image = timm.data.create_transform(**theirs)(Image.open(path).convert("RGB"))
    native = input_of(cfg)
    ours = Normalize(native.mean, native.std, native.size**2)(ValView(native)(str(path))[None])[0]
    torch.testing.assert_close(ours, image, rtol=0, atol=1e-6)


def test_a_resized_size_that_rounds_down() -> None:
    for size, resized in ((224, 232), (224, 256), (260, 292), (299, 342), (32, 32)):
        native = NativeInput(size, (0.5,) * 3, (0.5,) * 3, crop=size / resized)
        assert resized_size(native) == resized
    assert resized_size(NativeInput(260, (0.5,) * 3, (0.5,) * 3, crop=0.89)) == 292  # as timm: 292.13


@pytest.mark.parametrize("size", [32, 96])
def test_training_draws_other_views_in_every_epoch_and_the_same_again(tmp_path: Path, size: int) -> None:
    cfg = settings(fill(tmp_path, "train/a", "val/a"), "DATASET.IMAGE_SIZE", size, "SOLVER.BATCH_SIZE", 3)
    train, val, *_ = get_dataset(cfg)
    (one,), (two,) = list(train), list(train)
    train.set_epoch(1)
    (again,) = list(train)
    order, place = again[2].argsort(), two[2].argsort()
    assert torch.equal(one[0], again[0]) and not torch.equal(one[0][order], two[0][place])
    assert one[0].shape[-1] == next(iter(val))[0].shape[-1] == size


@pytest.mark.parametrize("name", ["", "crop_flip", "resized_crop"])
def test_training_crops_are_resized_as_the_student_says(tmp_path: Path, name: str) -> None:
    root = fill(tmp_path, "train/a", "val/a")
    cfg = settings(root, "DATASET.IMAGE_SIZE", 96, "DATASET.AUGMENT", name, model="timm/tf_efficientnet_lite0")
    view = get_dataset(cfg)[0]._data.train_view  # type: ignore[attr-defined]
    assert input_of(cfg).interpolation == "bicubic"
    assert view.transform.transform.transforms[0].interpolation.value == "bicubic"


# In memory or from files


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize("name", ["", "crop_flip", "resized_crop", "randaugment", "trivialaugment"])
def test_held_images_are_those_of_the_files_bit_for_bit(tmp_path: Path, size: int, name: str, views: bool) -> None:
    root = fill(tmp_path, "train/a", "train/b", "val/a", "val/b")
    save(root / "train" / "a" / "large.png", 99, (150, 130))
    usual = ["DATASET.IMAGE_SIZE", size, "DATASET.AUGMENT", name, "SOLVER.BATCH_SIZE", 3]
    cfg, from_files = settings(root, *usual), settings(root, *usual, "DATASET.MEMORY_GIB", 0.0)
    (train, val, *_), (train_2, val_2, *_) = get_dataset(cfg), get_dataset(from_files)
    for ours, theirs in zip(val, val_2, strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    if views:
        train.with_views(), train_2.with_views()  # type: ignore[attr-defined]
    for loader in (train, train_2):
        loader.set_epoch(2)
    batches = list(train)
    for ours, theirs in zip(batches, train_2, strict=True):
        assert len(ours) == 3 + 2 * views and all(map(torch.equal, ours, theirs))
    for ours, theirs in zip(batches[1:], train_2.iter_from(1), strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_files_are_not_read_again_once_their_images_are_held(tmp_path: Path) -> None:
    cfg = settings(fill(tmp_path, "train/a", "val/a"), model="ResNet18")
    train, val, *_ = get_dataset(cfg)
    for path in tmp_path.glob("*/*/*.png"):
        path.unlink()
    assert len(list(train)) == len(list(val)) == 1


def test_what_fits_in_memory_is_told_by_the_headers(tmp_path: Path) -> None:
    paths = [str(save(tmp_path / f"{i}.png", size=(64, 32))) for i in range(4)]
    (tmp_path / "broken.png").write_bytes(b"no image")
    need = 4 * 64 * 32 * 3 / 2**30
    assert fits([*paths, str(tmp_path / "broken.png")], need) and not fits(paths, need * 0.99)
    held = Held(paths, upright)
    assert all(torch.equal(held(path), upright(path)) for path in paths)


def test_the_kind_of_split_follows_the_size_and_the_memory(tmp_path: Path) -> None:
    root = fill(tmp_path, "train/a", "val/a")

    def kind(*overrides: object) -> type:
        cfg = settings(root, *overrides)
        return type(info_of(cfg).read(root, True))

    assert kind("DATASET.IMAGE_SIZE", 64) is ImageArray and kind("DATASET.IMAGE_SIZE", 65) is ImageFiles
    assert kind("DATASET.IMAGE_SIZE", 64, "DATASET.MEMORY_GIB", 1e-6) is ImageFiles


@pytest.mark.parametrize("size, gib", [(32, 4.0), (96, 4.0), (96, 0.0)])
def test_broken_images(tmp_path: Path, size: int, gib: float, capfd: pytest.CaptureFixture[str]) -> None:
    root = fill(tmp_path, "train/a", "val/a")
    (root / "train" / "a" / "1.png").write_bytes(b"no image")
    (root / "val" / "a" / "1.png").write_bytes(b"no image")
    cfg = settings(root, "DATASET.IMAGE_SIZE", size, "DATASET.MEMORY_GIB", gib)
    with pytest.raises(UserError, match=r"1.png cannot be read as an image .*, or set DATASET.SKIP_BROKEN True"):
        list(get_dataset(cfg)[0])
    cfg = settings(root, "DATASET.IMAGE_SIZE", size, "DATASET.MEMORY_GIB", gib, "DATASET.SKIP_BROKEN", True)
    train, val, *_ = get_dataset(cfg)
    assert sum(len(batch[0]) for batch in val) == 2 and all(len(batch[0]) for batch in train)
    assert capfd.readouterr().err.count("1 of 3 images are broken and ") == 2


# What a trained network is scored on


def test_scoring_needs_only_the_part_that_it_scores(tmp_path: Path) -> None:
    root = fill(tmp_path, "val/a", "val/b")
    inner = root / "val"
    assert get_val_loader(info_of(settings(root)), str(root)).targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert get_val_loader(info_of(settings(inner)), str(inner)).targets.tolist() == [0, 0, 0, 1, 1, 1]
    with pytest.raises(UserError, match="/train has no class folders to train on"):
        get_dataset(settings(root))
    only = fill(tmp_path / "only", "train/a")
    with pytest.raises(UserError, match=r"no val and no test to score on; --data-root .*/only/train scores on that"):
        get_val_loader(info_of(settings(only)), str(only))


def test_a_run_that_held_out_a_part_is_scored_on_it(tmp_path: Path) -> None:
    root = fill(tmp_path, "a", "b", images=10)
    cfg = settings(root, "DATASET.VAL_FRACTION", 0.2)
    _, val, *_ = get_dataset(cfg)
    scored = get_val_loader(info_of(cfg), str(root), batch_size=64)
    assert torch.equal(next(iter(scored))[0], next(iter(val))[0]) and len(scored.targets) == 4


def test_the_order_of_classes_is_that_of_the_whole_list(tmp_path: Path) -> None:
    cfg = settings(fill(tmp_path, "10", "9"))
    assert ClassFolders(cfg).classes(Parts.of(tmp_path, cfg)) == ["9", "10"]


@pytest.mark.slow
@pytest.mark.parametrize("name, top1", [("tf_efficientnet_lite0", 85.3), ("tf_efficientnet_lite2", 86.6)])
def test_real_weights_reach_their_accuracy_on_real_images(name: str, top1: float) -> None:
    root, weights = SHARED / "imagenet-sample", SHARED / "pretrained" / f"{name}.safetensors"
    if not (root.is_dir() and weights.is_file()):
        pytest.skip("needs the ImageNet sample and the weights beside it")
    pytest.importorskip("timm")
    from safetensors.torch import load_file

    from mdistiller.engine.scores import evaluate, model_heads
    from mdistiller.models.sources import build_network

    cfg = settings(root, model=f"timm/{name}")
    split = info_of(cfg).scored(root, False)
    network = build_network(f"timm/{name}", 1000).eval()
    network.load_state_dict(load_file(str(weights)))
    loader = split.select(torch.arange(0, 960, 3)).loader(16, min(2, os.cpu_count() or 1), train=False)
    (score,) = evaluate(loader, model_heads(network), torch.device("cpu")).values()
    assert score.top1 == pytest.approx(top1, abs=0.35)
