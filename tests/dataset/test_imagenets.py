"""Tiny-ImageNet and ImageNet: which file gets which label, and the errors for missing data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms import v2

from mdistiller.dataset import (
    dataset_dict,
    get_imagenet_dataloaders,
    get_imagenet_val_loader,
    get_tinyimagenet_dataloader,
    get_val_loader,
    imagenet,
    tiny_imagenet,
)
from mdistiller.dataset.augment import RotateFlip
from mdistiller.dataset.folders import ImageFiles
from mdistiller.dataset.image_file import to_pixels
from mdistiller.dataset.imagenet import MEAN, STD
from mdistiller.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"
WNIDS = [f"n{i:08}" for i in range(200)]


def save(path: Path, grey: int, size: int = 64) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (size, size), grey).save(path)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """tiny-imagenet-200 with three training images, and three validation images as in the zip; returns its root."""
    home = tmp_path / "tiny-imagenet-200"
    for wnid in WNIDS:
        (home / "train" / wnid / "images").mkdir(parents=True)
    for place in (0, 1, 199):
        save(home / "train" / WNIDS[place] / "images" / f"{WNIDS[place]}_0.JPEG", place)
    # The zip's own wnids.txt is not sorted; labels go by the sorted names.
    (home / "wnids.txt").write_text("\n".join(reversed(WNIDS)) + "\n")
    lines = []
    for name, place in (("val_0.JPEG", 199), ("val_1.JPEG", 1), ("val_2.JPEG", 199)):
        save(home / "val" / "images" / name, place)
        lines.append(f"{name}\t{WNIDS[place]}\t0\t32\t44\t62\n")
    (home / "val" / "val_annotations.txt").write_text("".join(lines))
    return tmp_path


def test_tiny_labels_by_hand(tiny: Path) -> None:
    train_loader, val_loader, count = get_tinyimagenet_dataloader(2, 2, 0, root=str(tiny))
    assert count == 3 and train_loader.targets.tolist() == [0, 1, 199]
    (image, target), (_, last) = val_loader
    assert [*target.tolist(), *last.tolist()] == [199, 1, 199]
    # val_0 is grey 199: (199 / 255 - 0.4802) / 0.2302 = 1.3041 in the red channel. JPEG keeps a flat grey.
    assert image.shape == (2, 3, 64, 64)
    assert torch.allclose(image[0, 0], torch.tensor(1.3041), atol=1e-4)


def test_tiny_train_images_are_rotated_and_mirrored(tiny: Path) -> None:
    train_loader, *_ = get_tinyimagenet_dataloader(3, 2, 0, root=str(tiny))
    image, _, index = next(iter(train_loader))
    bright = image[(index == 2).nonzero().item()]
    # A rotated corner shows black, (0 - 0.4802) / 0.2302, the middle stays grey 199.
    assert float(bright[0, 0, 0]) == pytest.approx(-2.0860, abs=1e-4)
    assert float(bright[0, 32, 32]) == pytest.approx(1.3041, abs=1e-4)


def test_tiny_accepts_class_folders_under_val(tiny: Path) -> None:
    val = tiny / "tiny-imagenet-200" / "val"
    for wnid in WNIDS:
        (val / wnid).mkdir()
    for name, place in (("val_0.JPEG", 199), ("val_1.JPEG", 1), ("val_2.JPEG", 199), ("val_3.JPEG", 0)):
        save(val / WNIDS[place] / name, place)
    assert get_val_loader("tiny_imagenet", str(tiny), 8, 0).targets.tolist() == [0, 1, 199, 199]


def test_tiny_without_wnids_uses_the_training_folders(tiny: Path) -> None:
    home = tiny / "tiny-imagenet-200"
    (home / "wnids.txt").unlink()
    assert get_val_loader("tiny_imagenet", str(tiny), 8, 0).targets.tolist() == [199, 1, 199]


def test_tiny_bad_annotations_are_named(tiny: Path) -> None:
    annotations = tiny / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    annotations.write_text("val_0.JPEG\tn99999999\t0\t0\t1\t1\n")
    with pytest.raises(UserError, match="line 1: 'n99999999' is not a class"):
        get_val_loader("tiny_imagenet", str(tiny))
    annotations.unlink()
    with pytest.raises(UserError, match=r"val_annotations\.txt is expected in"):
        get_val_loader("tiny_imagenet", str(tiny))


def test_tiny_short_wnids_are_refused(tiny: Path) -> None:
    (tiny / "tiny-imagenet-200" / "wnids.txt").write_text("n00000000\n")
    with pytest.raises(UserError, match="lists 1 classes, expected 200"):
        get_val_loader("tiny_imagenet", str(tiny))


@pytest.fixture
def image_net(tmp_path: Path) -> Path:
    """imagenet/{train,val} with 1,000 class folders, an image in the first and in the last; returns its root."""
    for part in ("train", "val"):
        for i in range(1000):
            (tmp_path / "imagenet" / part / f"n{i:08}").mkdir(parents=True)
        save(tmp_path / "imagenet" / part / "n00000000" / "a.JPEG", 10, size=300)
        save(tmp_path / "imagenet" / part / "n00000999" / "b.JPEG", 20, size=200)
    return tmp_path


def test_imagenet_batches(image_net: Path) -> None:
    train_loader, val_loader, count = get_imagenet_dataloaders(2, 2, 0, root=str(image_net))
    assert count == 2 and train_loader.targets.tolist() == [0, 999]
    image, target = next(iter(val_loader))
    assert image.shape == next(iter(train_loader))[0].shape == (2, 3, 224, 224)
    assert target.tolist() == [0, 999]
    # (10 / 255 - 0.485) / 0.229 = -1.9467
    assert torch.allclose(image[0, 0], torch.tensor(-1.9467), atol=1e-4)


def test_imagenet_val_alone(image_net: Path) -> None:
    (image_net / "imagenet" / "train").rename(image_net / "imagenet" / "elsewhere")
    assert get_imagenet_val_loader(2, num_workers=0, root=str(image_net)).targets.tolist() == [0, 999]
    with pytest.raises(UserError, match=r"ImageNet is expected in .*imagenet.train"):
        dataset_dict["imagenet"].read(image_net, True)


@pytest.mark.parametrize(("name", "folder"), [("tiny_imagenet", "tiny-imagenet-200/val"), ("imagenet", "imagenet/val")])
def test_missing_data_is_reported_in_one_line_with_the_folder(name: str, folder: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        get_val_loader(name, str(tmp_path))
    message = str(error.value)
    assert str(tmp_path / folder) in message and "DATASET.TYPE digits" in message and "\n" not in message


def test_transforms_are_those_of_the_original_code() -> None:
    assert RotateFlip(degrees=20, size=64) == tiny_imagenet.AUGMENT  # its pixels: test_augment.py
    assert [type(t) for t in imagenet.TRAIN.transforms] == [v2.RandomResizedCrop, v2.RandomHorizontalFlip]
    assert [type(t) for t in imagenet.VAL.transforms] == [v2.Resize, v2.CenterCrop]


def photo(path: Path, width: int = 320, height: int = 240) -> Path:
    """A JPEG of coloured noise, smooth like a photograph."""
    noise = torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(width)) * 255
    smooth = F.interpolate(noise, size=(height, width), mode="bicubic").clamp(0, 255).byte()
    Image.fromarray(smooth[0].permute(1, 2, 0).numpy()).save(path, quality=90)
    return path


TO_INPUT = (T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def photos(tmp_path: Path) -> list[Path]:
    """Real ImageNet images if there are any, else generated ones."""
    real = sorted((SHARED / "imagenet-sample" / "val").glob("*/*"))[:40]
    return real or [photo(tmp_path / f"{i}.jpg", 300 + i, 200) for i in range(8)]


def test_imagenet_validation_equals_pillow(tmp_path: Path) -> None:
    to_input = T.Compose([T.Resize(256), T.CenterCrop(224), *TO_INPUT])
    paths = photos(tmp_path)
    files = ImageFiles.of([(str(p), 0) for p in paths], imagenet.train_view, imagenet.val_view, MEAN, STD)
    images = torch.cat([image for image, _ in files.loader(7, 0, train=False)])
    assert torch.equal(images, torch.stack([to_input(Image.open(path).convert("RGB")) for path in paths]))


def test_imagenet_training_is_close_to_pillow(tmp_path: Path) -> None:
    """The same crops and flips for the same seed; resizing rounds differently, by at most two levels of 255."""
    by_pillow = T.Compose([T.RandomResizedCrop(224), T.RandomHorizontalFlip(), to_pixels])
    for seed, path in enumerate(photos(tmp_path)):
        torch.manual_seed(seed)
        ours = imagenet.train_view(str(path)).int()
        torch.manual_seed(seed)
        difference = (ours - by_pillow(Image.open(path).convert("RGB")).int()).abs()
        assert difference.max() <= 2 and difference.double().mean() < 0.25, path


@pytest.mark.skipif(not (SHARED / "tiny-imagenet-200-sample").is_dir(), reason="needs the Tiny-ImageNet sample")
def test_real_tiny_sample(tmp_path: Path) -> None:
    (tmp_path / "tiny-imagenet-200").mkdir()  # the cache is written next to the folders
    for name in ("train", "val", "wnids.txt"):
        (tmp_path / "tiny-imagenet-200" / name).symlink_to(SHARED / "tiny-imagenet-200-sample" / name)
    train_loader, val_loader, count = get_tinyimagenet_dataloader(50, 50, 0, root=str(tmp_path))
    assert count == 2000 and train_loader.targets.bincount().tolist() == [10] * 200
    # By hand: val_0.JPEG is n03444034, whose place among the sorted wnids is 107 from 0.
    wnids = sorted((tmp_path / "tiny-imagenet-200" / "wnids.txt").read_text().split())
    assert wnids[107] == "n03444034" and val_loader.targets[0] == 107 and len(val_loader.targets) == 600
    image, target, index = next(iter(train_loader))
    assert image.shape == (50, 3, 64, 64) and torch.equal(target, train_loader.targets[index])
    assert next(iter(val_loader))[0].shape == (50, 3, 64, 64)


@pytest.mark.skipif(not (SHARED / "imagenet-sample").is_dir(), reason="needs the ImageNet sample")
def test_real_imagenet_sample(tmp_path: Path) -> None:
    (tmp_path / "imagenet").symlink_to(SHARED / "imagenet-sample")
    loader = get_imagenet_val_loader(8, num_workers=0, root=str(tmp_path))
    assert loader.targets.tolist() == list(range(1000))
    assert next(iter(loader))[0].shape == (8, 3, 224, 224)
