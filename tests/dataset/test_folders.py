"""Image folders: the same batches with any number of workers, and errors that name the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from mdistiller.dataset.folders import FolderLoader, ImageFiles, class_folders, labelled_files
from mdistiller.dataset.image_file import read_image, read_pixels, to_pixels
from mdistiller.errors import UserError

AUGMENT = T.Compose([T.RandomCrop(8, padding=2), T.RandomHorizontalFlip(), to_pixels])
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)

# Python 3.12 and later warn of fork() in a process with threads; torch's workers do just that.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def train_view(path: str) -> torch.Tensor:
    return AUGMENT(read_image(path))


@pytest.fixture
def files(tmp_path: Path) -> ImageFiles:
    """Eleven noise images of 8x8 in the folders a (6) and b (5)."""
    g = torch.Generator().manual_seed(0)
    for i in range(11):
        folder = tmp_path / "ab"[i >= 6]
        folder.mkdir(exist_ok=True)
        pixels = torch.randint(0, 256, (8, 8, 3), generator=g, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i:02}.png")
    return ImageFiles.of(labelled_files(tmp_path, ["a", "b"]), train_view, read_pixels, MEAN, STD)


def batches_of(loader: FolderLoader, epoch: int, start: int = 0) -> list[tuple[torch.Tensor, ...]]:
    loader.set_epoch(epoch)
    return list(loader.iter_from(start))


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for one, two in zip(a, b) for x, y in zip(one, two))


def test_batches_hold_image_target_index(files: ImageFiles) -> None:
    loader = files.loader(4, 0, train=True)
    batches = list(loader)
    assert len(loader) == 3 and [len(t) for _, t, _ in batches] == [4, 4, 3]
    assert batches[0][0].shape == (4, 3, 8, 8) and batches[0][0].dtype == torch.float32
    target, index = (torch.cat(field) for field in list(zip(*batches))[1:])
    assert target.dtype == index.dtype == torch.int64
    assert torch.equal(target, loader.targets[index])
    assert index.sort().values.tolist() == list(range(11))
    assert loader.targets.tolist() == [0] * 6 + [1] * 5


def test_validation_is_in_order_without_randomness(files: ImageFiles) -> None:
    batches = list(files.loader(4, 0, train=False))
    to_input = T.Compose([T.ToTensor(), T.Normalize(MEAN, STD)])
    expected = [to_input(Image.open(path.decode())) for path in files.paths]
    assert torch.equal(torch.cat([x for x, _ in batches]), torch.stack(expected))
    assert torch.cat([t for _, t in batches]).tolist() == [0] * 6 + [1] * 5


def test_the_number_of_workers_changes_nothing(files: ImageFiles) -> None:
    alone, crew = files.loader(4, 0, train=True, seed=3), files.loader(4, 2, train=True, seed=3)
    for epoch in (1, 2):  # the second with the workers of the first
        assert same(batches_of(alone, epoch), batches_of(crew, epoch))
    assert same(batches_of(alone, 2)[1:], batches_of(crew, 2, start=1))


def test_batches_depend_only_on_seed_and_epoch(files: ImageFiles) -> None:
    loader = files.loader(4, 0, train=True, seed=3)
    first = batches_of(loader, 1)
    assert not same(first, batches_of(loader, 2))
    torch.manual_seed(99)
    assert same(first, batches_of(loader, 1))
    assert not same(first, batches_of(files.loader(4, 0, train=True, seed=4), 1))


def test_an_image_is_augmented_differently_in_every_epoch(files: ImageFiles) -> None:
    one = files.select(torch.tensor([5])).loader(1, 0, train=True)
    seen = {tuple(batches_of(one, epoch)[0][0].flatten().tolist()) for epoch in range(20)}
    assert len(seen) > 10  # of 25 crops x 2 flips


def test_the_loader_does_not_use_the_global_generator(files: ImageFiles) -> None:
    state = torch.get_rng_state()
    list(files.loader(4, 0, train=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_in_one_line(files: ImageFiles, workers: int) -> None:
    path = Path(files.paths[7].decode())
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError) as error:
        list(files.loader(4, workers, train=False))
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{path} cannot be read as an image")


def test_images_become_channels_last(files: ImageFiles) -> None:
    image, *_ = next(iter(files.loader(4, 0, train=True)))
    assert image.is_contiguous(memory_format=torch.channels_last)


def test_files_are_found_at_any_depth_and_only_images(tmp_path: Path) -> None:
    for name in ("b/images/2.JPEG", "b/images/1.JPEG", "a/z.png", "b/notes.txt", "other/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [(Path(path).relative_to(tmp_path).as_posix(), label) for path, label in labelled_files(tmp_path, "ab")]
    assert found == [("a/z.png", 0), ("b/images/1.JPEG", 1), ("b/images/2.JPEG", 1)]


def test_folders_without_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"no image in the class folders of {tmp_path}"):
        labelled_files(tmp_path, ["a"])


def test_missing_class_folders_are_counted(tmp_path: Path) -> None:
    for name in "cab":
        (tmp_path / name).mkdir()
    assert class_folders(tmp_path, 3) == ["a", "b", "c"]
    with pytest.raises(UserError, match="has 3 class folders, expected 1000"):
        class_folders(tmp_path, 1000)


def test_workers_must_not_be_negative(files: ImageFiles) -> None:
    with pytest.raises(UserError, match="number of workers must be at least 0, it is -1"):
        files.loader(4, -1, train=True)
