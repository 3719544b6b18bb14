"""Ranks: together they yield the epoch of a single process, bit for bit, and no image twice. Passes: which epoch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms as T

from mdistiller.dataset._base import Loader
from mdistiller.dataset.batch import host_index
from mdistiller.dataset.folders import ImageFiles
from mdistiller.dataset.image_file import read_image, read_pixels, to_pixels
from mdistiller.dataset.in_memory import ImageArray
from mdistiller.errors import UserError

COUNT = 21
AUGMENT = T.Compose([T.RandomCrop(8, padding=2), T.RandomHorizontalFlip(), to_pixels])
Make = Callable[..., Loader]

# Python 3.12 and later warn of fork() in a process with threads; torch's workers do just that.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture(params=["memory", "files", "files, a worker"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """(batch size, train, epoch) -> a loader of the same 21 images of 8x8 pixels, by default at epoch 3."""
    images = torch.randint(0, 256, (COUNT, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    targets = torch.arange(COUNT) % 5
    data: ImageArray | ImageFiles = ImageArray(images, targets, (0.5,) * 3, (0.25,) * 3)
    if request.param != "memory":
        paths = [tmp_path / f"{i}.png" for i in range(COUNT)]
        for path, pixels in zip(paths, images):
            Image.fromarray(pixels.numpy()).save(path)
        files = [(str(path), int(target)) for path, target in zip(paths, targets)]
        data = ImageFiles.of(files, lambda path: AUGMENT(read_image(path)), read_pixels, (0.5,) * 3, (0.25,) * 3)

    def loader(batch_size: int, train: bool, epoch: int | None = 3) -> Loader:
        made = data.loader(batch_size, 1 if "worker" in request.param else 0, train, seed=4)
        if epoch is not None:
            made.set_epoch(epoch)
        return made

    return loader


def joined(parts: list[tuple[Tensor, ...]]) -> list[Tensor]:
    return [torch.cat(field) for field in zip(*parts)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize(
    ("world", "batch_size", "sizes"),
    [
        (2, 8, [8, 8, 4]),  # 21 images are 8, 8 and 5, of which two ranks take 2 each
        (4, 8, [8, 8]),  # four ranks would take 1 each of 5
        (3, 6, [6, 6, 6]),  # three ranks 1 each of 3
        (3, 15, [15, 6]),
        (2, 2, [2] * 10),  # full batches give 1 each
        (3, 3, [3] * 7),
    ],
)
def test_training_ranks_together_yield_the_whole_batch(
    make: Make, world: int, batch_size: int, sizes: list[int]
) -> None:
    whole = list(make(batch_size, True))
    ranks = [list(make(batch_size, True).shard(r, world)) for r in range(world)]
    assert all([len(target) for _, target, _ in rank] == [s // world for s in sizes] for rank in ranks)
    for step, size in enumerate(sizes):
        assert same(joined([rank[step] for rank in ranks]), [field[:size] for field in whole[step]])


def test_a_last_batch_smaller_than_the_ranks_is_dropped(make: Make) -> None:
    loader = make(20, True).shard(1, 2)  # 20 and 1
    assert len(loader) == len(list(loader)) == 1


@pytest.mark.parametrize(("world", "batch_size", "steps"), [(1, 20, 1), (1, 10, 2), (1, 5, 4), (2, 6, 3), (8, 16, 1)])
def test_a_share_of_a_single_image_is_left_out_in_training(make: Make, world: int, batch_size: int, steps: int) -> None:
    """BatchNorm cannot train on one image. Of 21, full batches leave 1, or 3 for two ranks, 5 for eight."""
    loader = make(batch_size, True).shard(world - 1, world)
    every = list(loader)
    assert len(loader) == len(every) == steps and all(len(target) == batch_size // world for _, target, _ in every)
    for start in range(steps + 2):  # also behind the end, where a run of an older version may have stopped
        rest = list(loader.iter_from(start))
        assert len(rest) == max(0, steps - start)
        assert all(same(list(a), list(b)) for a, b in zip(rest, every[start:]))


def test_another_image_is_left_out_in_another_epoch(make: Make) -> None:
    loader, left_out = make(20, True), []
    for epoch in range(1, 9):
        loader.set_epoch(epoch)
        left_out += set(range(COUNT)) - {i for *_, index in loader for i in index.tolist()}
    assert len(left_out) == 8 and len(set(left_out)) > 3


def test_validation_keeps_a_single_image(make: Make) -> None:
    assert [len(target) for _, target in make(20, False)] == [20, 1]


def test_a_batch_size_of_one_image_a_process_stays(make: Make) -> None:
    assert [len(target) for _, target, _ in make(1, True)] == [1] * COUNT
    assert [len(target) for _, target, _ in make(4, True).shard(3, 4)] == [1] * 5


def test_every_number_of_images_and_ranks() -> None:
    """Against the shares counted one image at a time."""
    for count in range(1, 30):
        data = ImageArray(torch.zeros(count, 1, 1, 3, dtype=torch.uint8), torch.zeros(count).long(), [0] * 3, [1] * 3)
        for world in (w for w in (1, 2, 3, 4) if w <= count):
            for batch_size in range(world, 13, world):
                wanted, left = [], count
                while left:
                    batch = min(left, batch_size)
                    left -= batch
                    rank_images = 0
                    while batch >= world:
                        batch -= world
                        rank_images += 1
                    if rank_images > 1 or (rank_images == 1 and batch_size == world):
                        wanted.append(rank_images)
                if not wanted:
                    with pytest.raises(UserError, match=f"the training set has {count} image"):
                        data.loader(batch_size, 0, train=True).shard(0, world)
                    continue
                for rank in range(world):
                    loader = data.loader(batch_size, 0, train=True).shard(rank, world)
                    assert [len(target) for _, target, _ in loader] == wanted and len(loader) == len(wanted)


def test_a_training_set_too_small_for_any_step_is_refused() -> None:
    def data(count: int) -> ImageArray:
        return ImageArray(torch.zeros(count, 8, 8, 3, dtype=torch.uint8), torch.arange(count), [0] * 3, [1] * 3)

    message = r"training set has 1 image\(s\), too few for a step on 2 \(two a process\); .* SOLVER.BATCH_SIZE 1$"
    with pytest.raises(UserError, match=message):
        data(1).loader(64, 0, train=True)
    message = r"training set has 5 image\(s\), too few for a step on 6 \(two a process\); .* SOLVER.BATCH_SIZE 3$"
    with pytest.raises(UserError, match=message):
        data(5).loader(6, 0, train=True).shard(1, 3)
    assert len(data(1).loader(1, 0, train=True)) == len(data(5).loader(3, 0, train=True).shard(1, 3)) == 1
    assert len(data(1).loader(64, 0, train=False)) == 1


def test_validation_ranks_see_every_image_once(make: Make) -> None:
    whole = list(make(6, False))  # 6, 6, 6, 3
    ranks = [make(6, False).shard(r, 3) for r in range(3)]
    assert [len(rank) for rank in ranks] == [2, 1, 1]
    batches = [list(rank) for rank in ranks]
    assert same(batches[0][0], list(whole[0])) and same(batches[0][1], list(whole[3]))
    assert same(batches[1][0], list(whole[1])) and same(batches[2][0], list(whole[2]))
    assert [len(list(make(20, False).shard(r, 3))) for r in range(3)] == [1, 1, 0]


@pytest.mark.parametrize("train", [True, False])
def test_a_rank_can_resume_at_any_batch(make: Make, train: bool) -> None:
    loader = make(4, train).shard(1, 2)  # 21 images: global batches 0 to 5, the last of a single image
    every = list(loader)
    for batch in range(6):
        rest = list(loader.iter_from(batch))
        # Training: a slice of each; validation: batches 1, 3 and 5, of which those before `batch` are done.
        missing = batch if train else batch // 2
        assert len(rest) == max(0, len(every) - missing)
        assert all(same(list(a), list(b)) for a, b in zip(rest, every[missing:]))


def test_batches_that_cannot_be_shared_are_refused(make: Make) -> None:
    with pytest.raises(UserError, match=r"SOLVER.BATCH_SIZE 10 is not a multiple of 4 processes; .* set it to 8"):
        make(10, True).shard(0, 4)
    with pytest.raises(UserError, match="21 training images are too few for 32 processes"):
        make(32, True).shard(0, 32)
    make(10, False).shard(0, 4)


def test_shard_returns_the_loader(make: Make) -> None:
    loader = make(4, True)
    assert loader.shard(0, 1) is loader and (loader.rank, loader.world) == (0, 1)


def epochs(make: Make, *numbers: int, world: int = 1) -> list[list[tuple[Tensor, ...]]]:
    return [list(make(6, True, number).shard(world - 1, world)) for number in numbers]


def equal(a: list[tuple[Tensor, ...]], b: list[tuple[Tensor, ...]]) -> bool:
    return len(a) == len(b) and all(same(list(x), list(y)) for x, y in zip(a, b))


@pytest.mark.parametrize("world", [1, 2])
def test_without_set_epoch_each_pass_is_the_next_epoch(make: Make, world: int) -> None:
    """A loop in the original's manner, `for batch in loader`, as over a DataLoader that shuffles."""
    loader = make(6, True, epoch=None).shard(world - 1, world)
    wanted = epochs(make, 1, 2, 3, world=world)
    first = list(loader)
    assert loader.epoch == 1
    next(iter(loader))  # given up after a batch
    assert equal(first, wanted[0]) and equal(list(loader), wanted[2]) and loader.epoch == 3
    assert not equal(wanted[0], wanted[1])
    for one, other in zip(*(sorted(torch.cat([i for *_, i in epoch]).tolist()) for epoch in wanted[:2])):
        assert world > 1 or one == other  # each image once, in each pass


def test_the_rest_of_an_epoch_is_a_pass(make: Make) -> None:
    loader = make(6, True, epoch=None)
    assert equal(list(loader.iter_from(2)), epochs(make, 1)[0][2:]) and equal(list(loader), epochs(make, 2)[0])


def test_after_set_epoch_every_pass_is_that_epoch(make: Make) -> None:
    loader = make(6, True, epoch=None)
    list(loader)
    for number in (5, 2):
        loader.set_epoch(number)
        (wanted,) = epochs(make, number)
        assert equal(list(loader), wanted) and equal(list(loader.iter_from(1)), wanted[1:]) and loader.epoch == number


def test_a_pass_stays_in_the_epoch_in_which_it_began(make: Make) -> None:
    loader = make(6, True, epoch=None)
    begun = iter(loader)
    loader.set_epoch(9)
    assert equal(list(begun), epochs(make, 1)[0]) and equal(list(loader), epochs(make, 9)[0])


def test_every_validation_pass_is_the_same(make: Make) -> None:
    loader = make(6, False, epoch=None)
    assert equal(list(loader), list(loader)) and loader.epoch == 1


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_a_batch_tells_its_indices_and_the_next_ones(make: Make, world: int, start: int) -> None:
    loader = make(6, True).shard(world - 1, world)
    foreseen = None
    for *_, index in loader.iter_from(start):
        now, following = host_index(index)
        assert torch.equal(now, index) and (foreseen is None or torch.equal(foreseen, now))
        foreseen = following
    assert foreseen is not None and not len(foreseen)
