"""DATASET.TYPE torchvision/NAME: small files in torchvision's own layouts, read, downloaded or refused."""

from __future__ import annotations

import gzip
import io
import pickle
import socket
import struct
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import CIFAR10
from yacs.config import CfgNode as CN

from mdistiller.dataset import get_dataset, get_val_loader, info_of
from mdistiller.dataset.folders import FolderLoader
from mdistiller.dataset.in_memory import InMemoryLoader
from mdistiller.dataset.torchvision_sets import published
from mdistiller.engine.cfg import load_cfg
from mdistiller.errors import UserError

from ._server import serving


def config(root: Path, name: str, *overrides: str) -> CN:
    settings = {
        "DATASET.TYPE": f"torchvision/{name}", "DATASET.ROOT": root, "DATASET.NUM_WORKERS": 0,
        "DISTILLER.STUDENT": "resnet8", "SOLVER.BATCH_SIZE": 4, "EXPERIMENT.DEVICE": "cpu",
    }  # fmt: skip
    return load_cfg("configs/digits/vanilla.yaml", [*(str(x) for pair in settings.items() for x in pair), *overrides])


def noise(*shape: int) -> np.ndarray:
    return np.random.RandomState(shape[0]).randint(0, 256, shape).astype(np.uint8)


def photo(path: Path, size: tuple[int, int] = (40, 30), mode: str = "RGB", number: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(size[1] + number, size[0], 3)).convert(mode).save(path)


def make_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """12 training and 6 test images in CIFAR-10's files, whose checksums count as right."""
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    pixels = {"data_batch_1": noise(12, 3072), "test_batch": noise(6, 3072)}
    for name, images in pixels.items():
        content = {"data": images, "labels": [n % 10 for n in range(len(images))]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {9 - n}" for n in range(10)]}))
    sums = {path.name: md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    return pixels


def test_cifar10_is_held_in_memory_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = make_cifar10(tmp_path, monkeypatch)
    cfg = config(tmp_path, "CIFAR10")
    train, val, count, classes = get_dataset(cfg)
    assert isinstance(train, InMemoryLoader) and (count, classes) == (12, 10)
    assert train.class_names == tuple(f"class {9 - n}" for n in range(10)) and train.image_size == 32
    assert train.variants == 162  # crops after padding with 4 zeros, mirrored or not
    image, target = next(iter(val))
    assert target.tolist() == [0, 1, 2, 3, 4, 5]
    # The file holds a plane a channel: value 32 of plane 1 is row 1, column 0 of green. resnet8's own normalisation.
    value = pixels["test_batch"][0, 1024 + 32]
    assert float(image[0, 1, 1, 0]) == pytest.approx((value / 255 - 0.4867) / 0.2565, abs=1e-6)
    assert "train has 12 images, where the published data set has 50000" in capsys.readouterr().err


def test_the_settings_of_size_and_normalisation_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_cifar10(tmp_path, monkeypatch)
    own = ["DATASET.MEAN", "[0.5, 0.5, 0.5]", "DATASET.STD", "[0.5, 0.5, 0.5]", "DATASET.IMAGE_SIZE", "48"]
    _, val, *_ = get_dataset(config(tmp_path, "CIFAR10", *own))
    image = next(iter(val))[0]
    assert image.shape[2:] == (48, 48) and -1 <= image.min() < -0.5 < 0.5 < image.max() <= 1
    _, val, *_ = get_dataset(config(tmp_path, "CIFAR10", "DISTILLER.STUDENT", "ResNet18"))
    assert isinstance(val, FolderLoader) and next(iter(val))[0].shape[2:] == (224, 224)


def test_a_training_epoch_is_the_same_with_any_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cifar10(tmp_path, monkeypatch)
    epochs = []
    for workers in "01":
        train, *_ = get_dataset(
            config(tmp_path, "CIFAR10", "DISTILLER.STUDENT", "ResNet18", "DATASET.NUM_WORKERS", workers)
        )
        train.set_epoch(2)
        epochs.append(list(train))
    assert len(epochs[0]) == 3
    for one, other in zip(*epochs):
        assert all(torch.equal(a, b) for a, b in zip(one, other))


def test_info_needs_no_file(tmp_path: Path) -> None:
    for name, known in published.items():
        info = info_of(config(tmp_path / "nowhere", name))
        assert (info.num_classes, info.image_size) == (known.classes, 32)
        assert isinstance(getattr(torchvision.datasets, name), type)
    assert not (tmp_path / "nowhere").exists()


def make_mnist(root: Path) -> None:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", 10), ("t10k", 5)):
        images = struct.pack(">IIII", 0x803, count, 28, 28) + noise(count, 28, 28).tobytes()
        labels = struct.pack(">II", 0x801, count) + bytes(n % 10 for n in range(count))
        (folder / f"{part}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)


def make_svhn(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = {}
    for part in ("train", "test"):
        file = root / f"{part}_32x32.mat"
        savemat(file, {"X": noise(32, 32, 3, 7), "y": np.arange(1, 8)[:, None] + 3})
        lists[part] = ["http://127.0.0.1:9/none", file.name, md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", lists)


def make_stl10(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "stl10_binary"
    folder.mkdir()
    (folder / "class_names.txt").write_text("airplane\nbird\n")
    for part in ("train", "test"):
        (folder / f"{part}_X.bin").write_bytes(noise(4, 3, 96, 96).tobytes())
        (folder / f"{part}_y.bin").write_bytes(bytes([1, 2, 1, 2]))
    kind = torchvision.datasets.STL10
    sums = {path.name: md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    for part in ("train", "test"):
        files = [[f"{part}_{letter}.bin", sums[f"{part}_{letter}.bin"]] for letter in "Xy"]
        monkeypatch.setattr(kind, f"{part}_list", files)


def test_digits_are_grey_enlarged_and_not_mirrored(tmp_path: Path) -> None:
    make_mnist(tmp_path)
    train, val, count, _ = get_dataset(config(tmp_path, "MNIST"))
    assert count == 10 and train.class_names[:2] == ("0 - zero", "1 - one") and train.variants == 81
    image = next(iter(val))[0]
    pixels = (image * torch.tensor(val.std)[:, None, None] + torch.tensor(val.mean)[:, None, None]) * 255
    assert image.shape[2:] == (32, 32) and (pixels[:, 0] - pixels[:, 2]).abs().max() < 0.01
    # As the network sees it at its own size, they are as they are.
    _, val, *_ = get_dataset(config(tmp_path, "MNIST", "DATASET.IMAGE_SIZE", "28"))
    assert next(iter(val))[0].shape[2:] == (28, 28)


def test_large_digits_are_not_mirrored_either(tmp_path: Path) -> None:
    make_mnist(tmp_path)
    train, *_ = get_dataset(config(tmp_path, "MNIST", "DISTILLER.STUDENT", "ResNet18"))
    white = torch.zeros(28, 28, 3, dtype=torch.uint8)
    white[:, :14] = 255
    for seed in range(8):
        torch.manual_seed(seed)
        view = train._data.train_view.transform(white).float()
        assert view[:, 0].mean() >= view[:, -1].mean()


def test_svhn_and_stl10_hold_their_channels_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_svhn(tmp_path, monkeypatch)
    make_stl10(tmp_path, monkeypatch)
    train, val, count, _ = get_dataset(config(tmp_path, "SVHN"))
    assert count == 7 and val.targets.tolist() == [4, 5, 6, 7, 8, 9, 0] and train.class_names == tuple("0123456789")
    train, val, count, classes = get_dataset(config(tmp_path, "STL10", "DATASET.IMAGE_SIZE", "96"))
    assert count == 4 and classes == 10 and train.class_names[:3] == ("airplane", "bird", "2")
    image = next(iter(val))[0][0] * torch.tensor(val.std)[:, None, None] + torch.tensor(val.mean)[:, None, None]
    first = torch.from_numpy(noise(4, 3, 96, 96)[0].transpose(0, 2, 1)) / 255  # STL-10 stores columns
    assert torch.allclose(image, first, atol=1e-5)


def make_food101(root: Path) -> None:
    home, listed = root / "food-101", {}
    (home / "meta").mkdir(parents=True)
    for part in ("train", "test"):
        listed[part] = {name: [f"{name}/{part}{n}" for n in range(2)] for name in ("sushi", "apple_pie")}
        (home / "meta" / f"{part}.json").write_text(str(listed[part]).replace("'", '"'))
        for path in (path for paths in listed[part].values() for path in paths):
            photo(home / "images" / f"{path}.jpg", mode="L" if path.endswith("1") else "RGB")


def make_caltech101(root: Path) -> None:
    for number, name in enumerate(("BACKGROUND_Google", "ant", "Faces", "beaver")):
        for n in range(1, 4 + number):
            photo(root / "caltech101" / "101_ObjectCategories" / name / f"image_{n:04d}.jpg")


def make_caltech256(root: Path) -> None:
    for number, name in enumerate(("001.ak47", "002.american-flag")):
        for n in range(1, 5):
            photo(root / "caltech256" / "256_ObjectCategories" / name / f"{number + 1:03d}_{n:04d}.jpg")


def make_pet(root: Path) -> None:
    home = root / "oxford-iiit-pet"
    (home / "annotations").mkdir(parents=True)
    for part in ("trainval", "test"):
        lines = [f"{name}_{part}{n} {label} 1 1" for label, name in ((1, "Abyssinian"), (2, "shiba_inu")) for n in "12"]
        (home / "annotations" / f"{part}.txt").write_text("\n".join(lines) + "\n")
        for line in lines:
            photo(home / "images" / f"{line.split()[0]}.jpg")


def make_dtd(root: Path) -> None:
    home = root / "dtd" / "dtd"
    (home / "labels").mkdir(parents=True)
    for part in ("train", "val", "test"):
        names = [f"{name}/{name}_{part}{n}.jpg" for name in ("banded", "woven") for n in range(2)]
        (home / "labels" / f"{part}1.txt").write_text("\n".join(names) + "\n")
        for name in names:
            photo(home / "images" / name)


def make_aircraft(root: Path) -> None:
    home = root / "fgvc-aircraft-2013b" / "data"
    (home / "images").mkdir(parents=True)
    (home / "variants.txt").write_text("A310\nBoeing 707\n")
    for part in ("train", "val", "trainval", "test"):
        lines = [f"{part}{n} {('A310', 'Boeing 707')[n % 2]}" for n in range(4)]
        (home / f"images_variant_{part}.txt").write_text("\n".join(lines) + "\n")
        for line in lines:
            photo(home / "images" / f"{line.split()[0]}.jpg")


def make_eurosat(root: Path) -> None:
    for name in ("Forest", "River"):
        for n in range(4):
            photo(root / "eurosat" / "2750" / name / f"{name}_{n}.jpg", (64, 64))


def make_gtsrb(root: Path) -> None:
    home = root / "gtsrb"
    for label in (0, 1):
        for n in range(2):
            photo(home / "GTSRB" / "Training" / f"{label:05d}" / f"{n}.ppm", (15 + n, 20))
    lines = ["Filename;ClassId"]
    for n in range(4):
        photo(home / "GTSRB" / "Final_Test" / "Images" / f"{n}.ppm")
        lines.append(f"{n}.ppm;{n % 2}")
    (home / "GT-final_test.csv").write_text("\n".join(lines) + "\n")


def make_imagenette(root: Path) -> None:
    for part in ("train", "val"):
        for wnid in torchvision.datasets.Imagenette._WNID_TO_CLASS:
            photo(root / "imagenette2" / part / wnid / "0.JPEG")


def make_country211(root: Path) -> None:
    for part in ("train", "valid", "test"):
        for name in ("AD", "AE"):
            for n in range(2):
                photo(root / "country211" / part / name / f"{n}.jpg")


def make_sun397(root: Path) -> None:
    home = root / "SUN397"
    home.mkdir()
    (home / "ClassName.txt").write_text("/a/abbey\n/a/apse/indoor\n")
    for name in ("a/abbey", "a/apse/indoor"):
        for n in range(4):
            photo(home / name / f"sun_{n}.jpg")


def make_flowers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = root / "flowers-102"
    savemat_in(home, "imagelabels.mat", labels=np.arange(12) % 3 + 1)
    savemat_in(home, "setid.mat", trnid=np.arange(1, 5), valid=np.arange(5, 9), tstid=np.arange(9, 13))
    sums = {"label": "imagelabels.mat", "setid": "setid.mat"}
    files = {key: (name, md5((home / name).read_bytes()).hexdigest()) for key, name in sums.items()}
    kind = torchvision.datasets.Flowers102
    monkeypatch.setattr(kind, "_file_dict", {**kind._file_dict, **files})
    for n in range(1, 13):
        photo(home / "jpg" / f"image_{n:05d}.jpg")


def make_cars(root: Path) -> None:
    home = root / "stanford_cars"
    savemat_in(home / "devkit", "cars_meta.mat", class_names=np.array(["Audi TT", "BMW M3"], dtype=object))
    for part, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = np.zeros(4, dtype=[("fname", object), ("class", object)])
        for n in range(4):
            rows[n] = (f"{n}.jpg", n % 2 + 1)
            photo(home / f"cars_{part}" / f"{n}.jpg")
        savemat_in((home / file).parent, Path(file).name, annotations=rows)


def savemat_in(folder: Path, name: str, **content: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    savemat(folder / name, content)


def make_usps(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bz2

    lists = {}
    for part in ("train", "test"):
        lines = [" ".join([str(n % 10 + 1), *(f"{k + 1}:{(k + n) % 3 - 1}" for k in range(256))]) for n in range(8)]
        file = root / f"usps.{part}.bz2"
        file.write_bytes(bz2.compress(("\n".join(lines) + "\n").encode()))
        lists[part] = ["http://127.0.0.1:9/none", file.name, md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(torchvision.datasets.USPS, "split_list", lists)


def make_emnist(root: Path) -> None:
    folder = root / "EMNIST" / "raw"
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        images = struct.pack(">IIII", 0x803, 4, 28, 28) + noise(4, 28, 28).tobytes()
        (folder / f"emnist-balanced-{part}-images-idx3-ubyte").write_bytes(images)
        (folder / f"emnist-balanced-{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 4) + bytes(4))


# Data set -> how small files of it are made, its training and test labels, and its first class names.
LAYOUTS = {
    "Country211": (make_country211, [0, 0, 1, 1], [0, 0, 1, 1], ("AD", "AE")),
    "DTD": (make_dtd, [0, 0, 1, 1], [0, 0, 1, 1], ("banded", "woven")),
    "EMNIST": (make_emnist, [0] * 4, [0] * 4, ("0", "1")),
    "FGVCAircraft": (make_aircraft, [0, 1, 0, 1], [0, 1, 0, 1], ("A310", "Boeing 707")),
    "Food101": (make_food101, [1, 1, 0, 0], [1, 1, 0, 0], ("apple_pie", "sushi")),
    "GTSRB": (make_gtsrb, [0, 0, 1, 1], [0, 1, 0, 1], ("0", "1")),
    "Imagenette": (make_imagenette, list(range(10)), list(range(10)), ("tench", "English springer")),
    "OxfordIIITPet": (make_pet, [0, 0, 1, 1], [0, 0, 1, 1], ("Abyssinian", "Shiba Inu")),
    "StanfordCars": (make_cars, [0, 1, 0, 1], [0, 1, 0, 1], ("Audi TT", "BMW M3")),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_set_in_torchvision_s_layout_is_read(name: str, tmp_path: Path) -> None:
    make, train_labels, test_labels, names = LAYOUTS[name]
    make(tmp_path)
    train, val, count, classes = get_dataset(config(tmp_path, name))
    assert (count, classes) == (len(train_labels), published[name].classes) and isinstance(train, InMemoryLoader)
    assert train.targets.tolist() == train_labels and val.targets.tolist() == test_labels
    assert train.class_names[:2] == names and len(train.class_names) == classes
    assert next(iter(train))[0].shape[1:] == (3, 32, 32)


WITHOUT_TEST = {
    "Caltech101": (make_caltech101, ("Faces", "ant")),
    "Caltech256": (make_caltech256, ("001.ak47", "002.american-flag")),
    "EuroSAT": (make_eurosat, ("Forest", "River")),
    "SUN397": (make_sun397, ("abbey", "apse/indoor")),
}


@pytest.mark.parametrize("name", WITHOUT_TEST)
def test_a_set_without_a_test_split_takes_a_part_of_the_training_images(name: str, tmp_path: Path) -> None:
    make, names = WITHOUT_TEST[name]
    with pytest.raises(UserError, match=rf"torchvision/{name} has no split to validate on besides all; set DATASET."):
        get_dataset(config(tmp_path / "empty", name))
    assert not (tmp_path / "empty").exists()  # refused before anything is downloaded
    make(tmp_path)
    cfg = config(tmp_path, name, "DATASET.VAL_FRACTION", "0.25")
    train, val, count, _ = get_dataset(cfg)
    assert 0 < len(val.targets) <= 0.4 * count and train.class_names[:2] == names
    # A trained network is scored on what the run held out; without a run, on all.
    assert get_val_loader(info_of(cfg), str(tmp_path)).targets.tolist() == val.targets.tolist()
    every = [get_val_loader(info_of(config(tmp_path, name)), str(tmp_path), train=train) for train in (False, True)]
    assert [len(loader.targets) for loader in every] == [count + len(val.targets)] * 2


def test_usps_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_usps(tmp_path, monkeypatch)
    train, *_ = get_dataset(config(tmp_path, "USPS"))
    assert train.targets.tolist() == list(range(8)) and next(iter(train))[0].shape == (4, 3, 32, 32)


def test_splits_are_named_and_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_flowers(tmp_path, monkeypatch)
    train, val, count, _ = get_dataset(config(tmp_path, "Flowers102", "DATASET.TRAIN", "train+val"))
    assert count == 8 and val.targets.tolist() == [2, 0, 1, 2]
    assert train.class_names[:2] == ("pink primrose", "hard-leaved pocket orchid")
    assert get_dataset(config(tmp_path, "Flowers102", "DATASET.VAL", "val"))[1].targets.tolist() == [1, 2, 0, 1]
    with pytest.raises(UserError, match=r"unknown split \(DATASET.TRAIN\) of torchvision/Flowers102.*'trian'.*train"):
        get_dataset(config(tmp_path, "Flowers102", "DATASET.TRAIN", "trian"))


def test_arrays_of_joined_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_cifar10(tmp_path, monkeypatch)
    both = ["DATASET.TRAIN", "train+test", "DATASET.VAL_FRACTION", "0.5"]
    _, val, count, _ = get_dataset(config(tmp_path, "CIFAR10", *both))
    assert count + len(val.targets) == 18


def test_a_broken_file_is_named_or_skipped(tmp_path: Path) -> None:
    make_food101(tmp_path)
    broken = tmp_path / "food-101/images/sushi/train0.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(UserError, match=r"sushi/train0.jpg cannot be read as an image.*DATASET.SKIP_BROKEN True"):
        get_dataset(config(tmp_path, "Food101"))
    assert get_dataset(config(tmp_path, "Food101", "DATASET.SKIP_BROKEN", "True"))[2] == 3


def test_a_name_that_is_not_there_gets_the_near_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'cifar10'.*CIFAR10"):
        info_of(config(tmp_path, "cifar10"))
    with pytest.raises(UserError, match=r"CocoDetection"):
        info_of(config(tmp_path, "CocoDetection"))


def test_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    make_food101(tmp_path)
    with pytest.raises(UserError, match=r"torchvision/Food101 has 101 classes, but DATASET.NUM_CLASSES is 7; set"):
        get_dataset(config(tmp_path, "Food101", "DATASET.NUM_CLASSES", "7"))


@pytest.mark.parametrize("key", ["IMAGE_COLUMN", "LABEL_COLUMN"])
def test_a_setting_that_it_ignores_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"DATASET.{key} x has no effect on DATASET.TYPE torchvision/MNIST"):
        info_of(config(tmp_path, "MNIST", f"DATASET.{key}", "x"))


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    make_mnist(tmp_path)
    (tmp_path / "MNIST/raw/train-images-idx3-ubyte").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"torchvision/MNIST in .* cannot be read .*remove its files there") as error:
        get_dataset(config(tmp_path, "MNIST"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["CIFAR10", "MNIST", "Flowers102", "StanfordCars", "USPS"])
def test_no_network_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(UserError, match=rf"torchvision/{name} is expected in .*the download failed") as error:
        get_dataset(config(tmp_path, name))
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "") and socket.getdefaulttimeout() is None


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder behind a real server, where CIFAR-10's archive is looked for."""
    with serving(tmp_path / "served") as address:
        monkeypatch.setattr(CIFAR10, "url", f"{address}/{CIFAR10.filename}")
        yield tmp_path / "served" / CIFAR10.filename


def test_it_is_downloaded_once(served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_cifar10(tmp_path / "made", monkeypatch)
    with tarfile.open(served, "w:gz") as tar:
        tar.add(tmp_path / "made" / CIFAR10.base_folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(served.read_bytes()).hexdigest())
    assert get_dataset(config(tmp_path / "data", "CIFAR10"))[2] == 12
    served.unlink()
    assert get_dataset(config(tmp_path / "data", "CIFAR10"))[2] == 12


def test_a_wrong_checksum_is_refused(served: Path, tmp_path: Path) -> None:
    served.write_bytes(gzip.compress(b"something else"))
    with pytest.raises(UserError, match=r"the download failed \(File not found or corrupted"):
        get_dataset(config(tmp_path / "data", "CIFAR10"))


def test_torchvision_writes_nothing_outside(served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even from an archive whose checksum counts as right; tarfile's filter is as before afterwards."""
    with tarfile.open(served, "w:gz") as tar:
        member = tarfile.TarInfo("../outside")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"here"))
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(served.read_bytes()).hexdigest())
    before = tarfile.TarFile.extraction_filter
    with pytest.raises(UserError, match=r"the download failed .*outside"):
        get_dataset(config(tmp_path / "data", "CIFAR10"))
    assert not (tmp_path / "outside").exists() and tarfile.TarFile.extraction_filter is before
