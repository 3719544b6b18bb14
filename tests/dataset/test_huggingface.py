"""DATASET.TYPE hf: local data sets made on the spot, in every form that it reads; columns, labels and splits."""

from __future__ import annotations

import ast
import pickle
import re
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from yacs.config import CfgNode as CN

import mdistiller
from mdistiller.dataset import get_dataset, get_val_loader, info_of
from mdistiller.dataset.folders import FolderLoader
from mdistiller.dataset.in_memory import InMemoryLoader
from mdistiller.engine.build import build_trainer
from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.files.checkpoint import load_checkpoint
from mdistiller.errors import UserError

datasets = pytest.importorskip("datasets")

NAMES = ["zebra", "ant", "cat"]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The library's cache of converted files in a temporary folder, and no progress bars."""
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
    patch.undo()


def image(number: int, size: tuple[int, int] = (24, 20), mode: str = "RGB") -> Image.Image:
    noise = np.random.RandomState(number).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def rows(count: int = 6, **columns: Any) -> Any:
    """A split of images and, if no other columns are given, of labels with names."""
    features = {"image": datasets.Image()}
    if not columns:
        columns, features["label"] = {"label": [n % 3 for n in range(count)]}, datasets.ClassLabel(names=NAMES)
    data = {"image": [image(n) for n in range(count)], **columns}
    inferred = datasets.Dataset.from_dict(columns).features
    return datasets.Dataset.from_dict(data, features=datasets.Features({**inferred, **features}))


def config(root: Path, *overrides: str, type: str = "hf") -> CN:
    settings = {
        "DATASET.TYPE": type, "DATASET.ROOT": root, "DATASET.NUM_WORKERS": 0, "DISTILLER.STUDENT": "resnet8",
        "SOLVER.BATCH_SIZE": 3, "LOG.WANDB": False, "EXPERIMENT.DEVICE": "cpu",
    }  # fmt: skip
    return load_cfg("configs/digits/vanilla.yaml", [*(str(x) for pair in settings.items() for x in pair), *overrides])


def saved(folder: Path, **splits: Any) -> Path:
    datasets.DatasetDict(splits).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def as_parquet(folder: Path) -> Path:
    (folder / "parquet").mkdir()
    for name, count in (("train", 6), ("validation", 3)):
        rows(count).to_parquet(str(folder / "parquet" / f"{name}-00000-of-00001.parquet"))
    return folder / "parquet"


def as_arrow(folder: Path) -> Path:
    (folder / "arrow").mkdir()
    for name, count in (("train", 6), ("test", 3)):
        rows(count).save_to_disk(str(folder / name))
        [file] = (folder / name).glob("*.arrow")
        file.rename(folder / "arrow" / f"{name}.arrow")
    return folder / "arrow"


def as_folders(folder: Path) -> Path:
    for part, count in (("train", 6), ("validation", 3)):
        for n in range(count):
            path = folder / "images" / part / sorted(NAMES)[n % 3] / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image(n).save(path)
    return folder / "images"


FORMS = {
    "save_to_disk": ("hf", lambda folder: saved(folder, train=rows(6), test=rows(3)), NAMES),
    "Parquet": ("hf", as_parquet, NAMES),
    "Arrow": ("hf", as_arrow, NAMES),
    "imagefolder": ("hf/imagefolder", as_folders, sorted(NAMES)),
    "hf/parquet": ("hf/parquet", as_parquet, NAMES),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_local_set_of_any_form_is_read(form: str, tmp_path: Path) -> None:
    """The splits train and validation or test; images resized as the student sees them, in memory."""
    type_, make, names = FORMS[form]
    cfg = config(make(tmp_path), type=type_)
    train, val, count, classes = get_dataset(cfg)
    assert isinstance(train, InMemoryLoader) and (count, classes) == (6, 3)
    assert train.class_names == val.class_names == tuple(names)
    assert train.targets.tolist() == [0, 1, 2, 0, 1, 2] or form == "imagefolder"
    [(images, targets)] = list(val)
    assert images.shape == (3, 3, 32, 32) and targets.tolist() == [0, 1, 2]
    assert train.image_size == 32 and info_of(cfg).num_classes == 3


def test_one_file_is_one_split(tmp_path: Path) -> None:
    rows(8).to_parquet(str(tmp_path / "all.parquet"))
    with pytest.raises(UserError, match=r"hf has no split to validate on besides train; set DATASET.VAL_FRACTION"):
        get_dataset(config(tmp_path / "all.parquet"))
    *_, count, classes = get_dataset(config(tmp_path / "all.parquet", "DATASET.VAL_FRACTION", "0.4"))
    assert (count, classes) == (5, 3)
    loader = get_val_loader(info_of(config(tmp_path / "all.parquet")), str(tmp_path / "all.parquet"))
    assert len(loader.targets) == 8  # outside of a run, all of them are scored


def test_one_saved_split_is_read(tmp_path: Path) -> None:
    rows(8).save_to_disk(str(tmp_path / "one"))
    assert get_dataset(config(tmp_path / "one", "DATASET.VAL_FRACTION", "0.4"))[2] == 5


def test_large_images_keep_their_pixels_for_random_crops(tmp_path: Path) -> None:
    """The validation view is Pillow's; a training batch is the same with any number of workers, and held in memory."""
    root = saved(tmp_path, train=rows(6), test=rows(2))
    batches = []
    for more in (["DATASET.NUM_WORKERS", "0"], ["DATASET.NUM_WORKERS", "1"], ["DATASET.MEMORY_GIB", "0"]):
        train, val, *_ = get_dataset(config(root, "DISTILLER.STUDENT", "ResNet18", *more))
        assert isinstance(train, FolderLoader)
        train.set_epoch(3)
        batches.append([fields[0] for fields in train])
        assert batches[-1][0].shape == (3, 3, 224, 224) and torch.equal(batches[-1][0], batches[0][0])
        assert train.image_size == 224
    resized = np.array(image(0).resize((307, 256), Image.Resampling.BILINEAR))[16:240, 42:266]
    shown = next(iter(val))[0][0] * torch.tensor((0.229, 0.224, 0.225))[:, None, None]
    mean = torch.tensor((0.485, 0.456, 0.406))[:, None, None]
    difference = (shown + mean) * 255 - torch.from_numpy(resized).permute(2, 0, 1)
    assert difference.abs().max() < 1.01


def test_a_split_goes_to_workers_that_are_not_forked(tmp_path: Path) -> None:
    root = saved(tmp_path, train=rows(6), test=rows(2))
    train, *_ = get_dataset(config(root, "DISTILLER.STUDENT", "ResNet18", "DATASET.MEMORY_GIB", "0"))
    data = train._data
    there, name = pickle.loads(pickle.dumps(data)), f"{root} train[3]"
    assert torch.equal(there.val_view(name), data.val_view(name)) and data.paths[3].decode() == name


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1", "LA"])
def test_every_mode_is_read(mode: str, tmp_path: Path) -> None:
    """As bytes of a file, which the library's own decoder would give in their mode."""
    made = Image.fromarray(np.full((20, 20), 257 * 40, np.uint16)) if mode == "I;16" else image(0, mode=mode)
    made.save(file := BytesIO(), "TIFF")
    cells = [{"bytes": file.getvalue(), "path": None}] * 4
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    split = datasets.Dataset.from_dict({"image": cells, "label": [0, 1, 2, 0]}, features=features)
    train, *_ = get_dataset(config(saved(tmp_path, train=split, test=split)))
    assert next(iter(train))[0].shape == (3, 3, 32, 32)


def test_images_are_turned_as_their_exif_block_says(tmp_path: Path) -> None:
    made = Image.fromarray(np.vstack([np.full((16, 32, 3), 255, np.uint8), np.zeros((16, 32, 3), np.uint8)]))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    made.save(file := BytesIO(), "PNG", exif=exif)
    split = datasets.Dataset.from_dict({"image": [file.getvalue()] * 4, "label": ["a", "b"] * 2})
    _, val, *_ = get_dataset(config(saved(tmp_path, train=split, test=split)))
    shown = next(iter(val))[0][0]
    assert shown[:, 0].max() < 0 < shown[:, -1].min()


CELLS = {
    "bytes": lambda n, folder: file_bytes(n),
    "paths": lambda n, folder: written(n, folder),
    "bytes and path": lambda n, folder: {"bytes": file_bytes(n), "path": None},
    "pixels": lambda n, folder: np.array(image(n)).tolist(),
}


def file_bytes(number: int) -> bytes:
    image(number).save(file := BytesIO(), "PNG")
    return file.getvalue()


def written(number: int, folder: Path) -> str:
    image(number).save(folder / f"{number}.png")
    return f"{number}.png"


@pytest.mark.parametrize("form", CELLS)
def test_a_column_of_no_image_type_is_found_by_its_name(form: str, tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    cells = [CELLS[form](n, tmp_path / "saved") for n in range(4)]
    split = datasets.Dataset.from_dict({"img": cells, "labels": ["b", "a", "b", "a"]})
    _, val, *_ = get_dataset(config(saved(tmp_path, train=split, test=split)))
    expected, *_ = get_dataset(config(saved(tmp_path / "other", train=rows(4), test=rows(4))))[1]
    assert torch.equal(next(iter(val))[0], expected[0])
    assert val.class_names == ("a", "b") and val.targets.tolist() == [1, 0, 1, 0]


def test_whole_numbers_as_labels_are_numbered_in_their_order(tmp_path: Path) -> None:
    train, test = rows(4, label=[10, 2, 7, 2]), rows(2, label=[7, 10])
    loaders = get_dataset(config(saved(tmp_path, train=train, test=test)))
    assert loaders[0].class_names == ("2", "7", "10") and loaders[0].targets.tolist() == [2, 0, 1, 0]
    assert loaders[1].targets.tolist() == [1, 2]


REFUSED = {
    "no known column": (
        {"fine": [0, 1]}, (), r"no column known to hold labels, but image \(Image\), fine \(int64\); name it by DA",
    ),
    "several usual names": (
        {"fine_label": [0, 1], "coarse_label": [1, 0]}, (),
        r"hf has several columns of labels: fine_label, coarse_label; name one by DATASET.LABEL_COLUMN",
    ),
    "a wrong name": (
        {"label": [0, 1]}, ("DATASET.LABEL_COLUMN", "lable"),
        r"unknown column \(DATASET.LABEL_COLUMN\) of hf.*'lable'.*label",
    ),
    "no label": ({"label": [0, None]}, (), r"split train has the label None in row 1 of label, which is no text"),
    "fractions": ({"label": [0.5, 1.0]}, (), r"has the label 0\.5 in row 0 of label, which is no text or whole number"),
    "another number of classes": (
        {"label": [0, 1]}, ("DATASET.NUM_CLASSES", "5"), r"hf has 2 classes, but DATASET.NUM_CLASSES is 5; set it to 0",
    ),
    "an unknown split": (
        {"label": [0, 1]}, ("DATASET.VAL", "tset"), r"unknown split \(DATASET.VAL\) of hf.*'tset'.*test",
    ),
    "one split twice": (
        {"label": [0, 1]}, ("DATASET.VAL", "train"), r"split train is in DATASET.TRAIN and in DATASET.VAL",
    ),
    "an image column that holds none": (
        {"label": [0, 1], "text": ["a", "b"]}, ("DATASET.IMAGE_COLUMN", "text"), r"saved/a cannot be read as an image",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_columns_labels_and_splits_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    columns, overrides, message = REFUSED[case]
    split = rows(2, **columns)
    with pytest.raises(UserError, match=message) as error:
        get_dataset(config(saved(tmp_path, train=split, test=split), *overrides))
    assert "\n" not in str(error.value)


def test_named_columns_and_splits_are_taken(tmp_path: Path) -> None:
    split = rows(4, fine_label=["a", "b", "c", "d"], coarse_label=["x", "x", "y", "y"])
    root = saved(tmp_path, base=split, extra=split, held=split)
    with pytest.raises(UserError, match=r"hf has no split train, but base, extra, held; name one by DATASET.TRAIN"):
        get_dataset(config(root))
    named = ["DATASET.TRAIN", "base+extra", "DATASET.VAL", "held", "DATASET.LABEL_COLUMN", "coarse_label"]
    train, _, count, classes = get_dataset(config(root, *named))
    assert (count, classes) == (8, 2) and train.targets.tolist() == [0, 0, 1, 1] * 2


def test_a_split_without_labels_is_refused(tmp_path: Path) -> None:
    unlabelled = rows(3).cast_column("label", datasets.Value("int64")).remove_columns("label").add_column(
        "label", [-1, -1, -1]
    ).cast_column("label", datasets.ClassLabel(names=NAMES))  # fmt: skip
    root = saved(tmp_path, train=rows(6), test=unlabelled)
    with pytest.raises(UserError, match=r"split test has the label -1 in row 0, .*its images have no labels; nam"):
        get_dataset(config(root))


def test_a_number_that_stands_for_no_label_is_no_class(tmp_path: Path) -> None:
    root = saved(tmp_path, train=rows(4, label=[1, 2, 3, -1]), test=rows(2, label=[1, 2]))
    with pytest.raises(UserError, match=r"split train has the label -1 in row 3, .*its images have no labels"):
        get_dataset(config(root))


def test_splits_with_other_classes_are_refused(tmp_path: Path) -> None:
    other = rows(3).cast_column("label", datasets.ClassLabel(names=["ant", "cat", "zebra"]))
    with pytest.raises(UserError, match=r"column label is ClassLabel of zebra, ant, cat in the training split and "):
        get_dataset(config(saved(tmp_path, train=rows(6), test=other)))
    root = saved(tmp_path / "text", train=rows(2, label=["a", "b"]), test=rows(2, label=["a", "c"]))
    with pytest.raises(UserError, match=r"split test has the label 'c' in row 1, which is no class: the classes"):
        get_dataset(config(root))


@pytest.mark.parametrize("student", ["resnet8", "ResNet18"])
def test_broken_images_are_skipped_or_named(student: str, tmp_path: Path) -> None:
    cells = [file_bytes(n) for n in range(8)]
    cells[2] = cells[2][:60]
    split = datasets.Dataset.from_dict({"image": cells, "label": ["a", "b"] * 4})
    root = saved(tmp_path, train=split, test=split)
    options = ["DISTILLER.STUDENT", student]
    with pytest.raises(UserError, match=r"saved (train|test)\[2\] cannot be read as an image .* DATASET.SKIP_BROKEN"):
        for loader in get_dataset(config(root, *options))[:2]:
            list(loader)
    train, val, *_ = get_dataset(config(root, *options, "DATASET.SKIP_BROKEN", "True"))
    assert sum(len(target) for _, target in val) == 7
    assert all(torch.isfinite(fields[0]).all() for fields in train)


@pytest.mark.parametrize("name", ["data.csv", "nowhere", "damaged.parquet"])
def test_what_is_no_data_set_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("a,b\n")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError, match=rf"{name}") as error:
        get_dataset(config(tmp_path / name))
    assert "\n" not in str(error.value)


def test_the_library_is_imported_only_when_it_is_named() -> None:
    """Nothing of the package imports it at its top, where every command would wait for it."""
    for file in Path(mdistiller.__file__).parent.rglob("*.py"):
        text = file.read_text()
        if not re.search("(import|from) (datasets|pyarrow)", text):
            continue
        tops = [node for node in ast.parse(text).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {alias.name for node in tops for alias in node.names if isinstance(node, ast.Import)}
        names |= {str(node.module) for node in tops if isinstance(node, ast.ImportFrom) and not node.level}
        assert not {name.partition(".")[0] for name in names} & {"datasets", "pyarrow"}, file


def test_the_library_s_absence_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"^DATASET.TYPE hf needs the library datasets: pip install -e .\[hf\]"):
        get_dataset(config(tmp_path))


def test_a_name_of_the_hub_without_a_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach 'user/images' on the Hub\n(offline)")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=r"hf/user/images: datasets cannot load user/images .*save_to_disk") as error:
        get_dataset(config(tmp_path, type="hf/user/images"))
    assert "\n" not in str(error.value)


def test_a_name_of_the_hub_and_its_configuration_are_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load(*args: object) -> Any:
        asked.append(args)
        return datasets.DatasetDict(train=rows(6), test=rows(3))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert get_dataset(config(tmp_path, type="hf/user/images:small"))[2] == 6
    assert get_dataset(config(tmp_path, type="hf/mnist"))[2] == 6
    assert {*asked} == {("user/images", "small"), ("mnist", None)}


def test_a_run_trains_resumes_and_writes_the_class_names(tmp_path: Path) -> None:
    """Its configuration tells the facts of the data, which are then not needed to build the networks."""
    root = saved(tmp_path, train=rows(6), test=rows(3))
    overrides = ["SOLVER.EPOCHS", "1", "LOG.PREFIX", str(tmp_path), "SOLVER.BATCH_SIZE", "6"]
    trainer = build_trainer(config(root, *overrides), name="run/hf")
    trainer.train()
    content = load_checkpoint(tmp_path / "run/hf/student_best")
    assert content["class_names"] == NAMES and content["input"]["image_size"] == 32
    assert (trainer.cfg.DATASET.NUM_CLASSES, trainer.cfg.DATASET.IMAGE_SIZE) == (3, 32)
    build_trainer(config(root, *overrides), name="run/hf").train(resume=True)
    root.rename(tmp_path / "moved")
    assert info_of(trainer.cfg).num_classes == 3
