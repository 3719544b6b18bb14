"""The facts of each data set on its loaders: class names, mean and standard deviation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from mdistiller.dataset import ImageArray, Loader, dataset_info, get_dataloaders, get_val_loader
from mdistiller.dataset._base import DatasetInfo, register
from mdistiller.dataset.folders import ImageFiles
from mdistiller.dataset.image_file import read_pixels
from mdistiller.errors import UserError

from .test_cifar100 import make_cifar

SHARED = Path(__file__).parents[3] / "shared" / "data"
DATA = Path(__file__).parents[2] / "data"
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def facts(loader: Loader) -> tuple[tuple[str, ...], tuple[float, ...], tuple[float, ...]]:
    return loader.class_names, loader.mean, loader.std


def test_digits() -> None:
    names = "0", "1", "2", "3", "4", "5", "6", "7", "8", "9"
    # select() by both fractions keeps them.
    loaders = get_dataloaders("digits", 8, 8, 0, train_fraction=0.1, val_fraction=0.2)[:2]
    for loader in (*loaders, get_val_loader("digits"), get_val_loader("digits", train=True)):
        assert facts(loader) == (names, (0.3050,) * 3, (0.3234,) * 3)


def test_cifar100_names_come_from_its_meta_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_cifar(tmp_path, monkeypatch)
    names = tuple(f"class {99 - i}" for i in range(100))
    for loader in get_dataloaders("cifar100", 8, 8, 0, str(tmp_path), train_fraction=0.5)[:2]:
        assert facts(loader) == (names, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


@pytest.mark.skipif(not (DATA / "cifar-100-python" / "test").is_file(), reason="needs CIFAR-100 in data/")
def test_real_cifar100() -> None:
    names = get_val_loader("cifar100", str(DATA)).class_names
    assert len(names) == 100 and (names[0], names[49], names[33], names[99]) == ("apple", "mountain", "forest", "worm")


def folders_of_images(part: Path, names: list[str], size: int) -> None:
    for name in names:
        (part / name).mkdir(parents=True)
        Image.new("L", (size, size)).save(part / name / "0.JPEG")


def test_tiny_imagenet(tmp_path: Path) -> None:
    wnids = [f"n{i:08}" for i in range(200)]
    home = tmp_path / "tiny-imagenet-200"
    for part in ("train", "val"):
        folders_of_images(home / part, wnids, 64)
    (home / "wnids.txt").write_text("\n".join(reversed(wnids)) + "\n")
    for loader in get_dataloaders("tiny_imagenet", 8, 8, 0, str(tmp_path))[:2]:
        assert facts(loader) == (tuple(wnids), (0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262))


@pytest.mark.skipif(not (SHARED / "tiny-imagenet-200-sample").is_dir(), reason="needs the Tiny-ImageNet sample")
def test_real_tiny_sample(tmp_path: Path) -> None:
    (tmp_path / "tiny-imagenet-200").mkdir()  # the cache is written next to the folders
    for name in ("val", "wnids.txt"):
        (tmp_path / "tiny-imagenet-200" / name).symlink_to(SHARED / "tiny-imagenet-200-sample" / name)
    loader = get_val_loader("tiny_imagenet", str(tmp_path))
    # val_0.JPEG is n03444034, by the first line of val_annotations.txt.
    assert len(loader.class_names) == 200 and loader.class_names[int(loader.targets[0])] == "n03444034"


def test_imagenet(tmp_path: Path) -> None:
    wnids = [f"n{i:08}" for i in range(1000)]
    for part in ("train", "val"):
        for name in wnids:
            (tmp_path / "imagenet" / part / name).mkdir(parents=True)
        for name in wnids[:4]:
            Image.new("L", (8, 8)).save(tmp_path / "imagenet" / part / name / "0.JPEG")
    for loader in get_dataloaders("imagenet", 2, 2, 0, str(tmp_path), train_fraction=0.9)[:2]:
        assert facts(loader) == (tuple(wnids), *IMAGENET)


@pytest.mark.skipif(not (SHARED / "imagenet-sample").is_dir(), reason="needs the ImageNet sample")
def test_real_imagenet_sample(tmp_path: Path) -> None:
    (tmp_path / "imagenet").symlink_to(SHARED / "imagenet-sample")
    names = get_val_loader("imagenet", str(tmp_path)).class_names
    assert len(names) == 1000 and (names[0], names[1], names[999]) == ("n01440764", "n01443537", "n15075141")


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("digits", (0.3050,) * 3, (0.3234,) * 3),
        ("cifar100", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
        ("tiny_imagenet", (0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
        ("imagenet", *IMAGENET),
    ],
)
def test_the_registry_knows_mean_and_std(name: str, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    assert (dataset_info[name].mean, dataset_info[name].std) == (mean, std)


def test_a_data_set_without_names_works(monkeypatch: pytest.MonkeyPatch) -> None:
    @register("nameless", 3, 8, "cifar")
    def read(root: Path, train: bool, skip_broken: bool = False) -> ImageArray:
        return ImageArray(torch.zeros(6, 8, 8, 3, dtype=torch.uint8), torch.arange(6) % 3, [0, 0.5, 1], [1, 1, 1])

    info: DatasetInfo = dataset_info.pop("nameless")
    monkeypatch.setitem(dataset_info, "nameless", info)  # for this test only
    train, val, count = get_dataloaders("nameless", 2, 2, 0)
    assert count == 6 and len(list(train)) == len(list(val)) == 3
    assert facts(train) == facts(val) == ((), (0.0, 0.5, 1.0), (1.0, 1.0, 1.0))
    assert all(type(value) is float for value in train.mean) and (info.mean, info.std) == ((), ())


def test_names_of_files_are_kept_by_select(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for path in paths:
        Image.new("L", (4, 4)).save(path)
    files = [(str(path), i % 2) for i, path in enumerate(paths)]
    data = ImageFiles.of(files, read_pixels, read_pixels, (0,) * 3, (1,) * 3, class_names=["cat", "dog"])
    for train in (True, False):
        assert data.select(torch.tensor([3, 0])).loader(2, 0, train).class_names == ("cat", "dog")
    assert ImageFiles.of(files, read_pixels, read_pixels, (0,) * 3, (1,) * 3).loader(2, 0, True).class_names == ()


def test_a_label_without_a_name_is_refused() -> None:
    images = torch.zeros(3, 4, 4, 3, dtype=torch.uint8)
    data = ImageArray(images, torch.tensor([0, 2, 1]), (0,) * 3, (1,) * 3, class_names=("cat", "dog"))
    with pytest.raises(UserError, match="label 2 has no name: there are 2 class_names"):
        data.loader(2, 0, train=False)
