"""Batches of images in memory: torchvision's pixels bit for bit, the same probabilities, and resumable."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from mdistiller.dataset.augment import CropFlip, crop_and_flip
from mdistiller.dataset.in_memory import ImageArray, InMemoryLoader, Normalize

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


def random_array(count: int, size: int = 32, flip: bool = True) -> ImageArray:
    g = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, size, size, 3), generator=g, dtype=torch.uint8)
    return ImageArray(images, torch.randint(0, 10, (count,), generator=g), MEAN, STD, CropFlip(flip=flip))


def by_torchvision(image: torch.Tensor, top: int, left: int, mirrored: bool, padding: int) -> torch.Tensor:
    """One image through PIL, step by step as RandomCrop, RandomHorizontalFlip, ToTensor and Normalize do."""
    pil = TF.pad(Image.fromarray(image.numpy()), [padding])
    pil = TF.crop(pil, top, left, image.shape[0], image.shape[1])
    pil = TF.hflip(pil) if mirrored else pil
    return TF.normalize(TF.to_tensor(pil), MEAN, STD)


@pytest.mark.parametrize("padding", [4, 1])
def test_every_crop_and_flip_equals_torchvision(padding: int) -> None:
    places = 2 * padding + 1
    top, left, mirrored = torch.meshgrid(torch.arange(places), torch.arange(places), torch.arange(2), indexing="ij")
    top, left, mirrored = top.flatten(), left.flatten(), mirrored.flatten().bool()
    images = random_array(len(top)).images
    ours = Normalize(MEAN, STD, 32 * 32)(crop_and_flip(images, top, left, mirrored, padding))
    for i in range(len(top)):
        draw = int(top[i]), int(left[i]), bool(mirrored[i])
        assert torch.equal(ours[i], by_torchvision(images[i], *draw, padding)), draw


def test_crop_by_hand() -> None:
    image = torch.tensor([[[1], [2]], [[3], [4]]], dtype=torch.uint8)[None]
    # Padded by 1:  0 0 0 0 / 0 1 2 0 / 0 3 4 0 / 0 0 0 0; rows 0-1, columns 1-2 are 0 0 / 1 2, mirrored 0 0 / 2 1.
    out = crop_and_flip(image, torch.tensor([0]), torch.tensor([1]), torch.tensor([True]), padding=1)
    assert out[0, :, :, 0].tolist() == [[0, 0], [2, 1]]


def test_training_batches_are_the_drawn_crops_of_the_indexed_images() -> None:
    data = random_array(50)
    loader = data.loader(16, 0, train=True, seed=3)
    loader.set_epoch(7)
    _, top, left, mirrored = loader.draw()
    for image, target, index in loader:
        assert (image.dtype, target.dtype, index.dtype) == (torch.float32, torch.int64, torch.int64)
        assert torch.equal(target, data.targets[index])
        for row, i in enumerate(index.tolist()):
            draw = int(top[i]), int(left[i]), bool(mirrored[i])
            assert torch.equal(image[row], by_torchvision(data.images[i], *draw, 4))


def test_images_are_channels_last() -> None:
    image, *_ = next(iter(random_array(4).loader(4, 0, train=True)))
    assert image.shape == (4, 3, 32, 32) and image.is_contiguous(memory_format=torch.channels_last)


def test_validation_goes_in_order_unaugmented_and_keeps_the_short_batch() -> None:
    data = random_array(21)
    loader = data.loader(8, 0, train=False)
    batches = list(loader)
    assert len(loader) == len(batches) == 3 and [len(t) for _, t in batches] == [8, 8, 5]
    expected = torch.stack([by_torchvision(x, 4, 4, False, 4) for x in data.images])  # (4, 4): the middle
    assert torch.equal(torch.cat([x for x, _ in batches]), expected)
    assert torch.equal(torch.cat([t for _, t in batches]), data.targets)


def chi_square(counts: torch.Tensor) -> float:
    expected = counts.sum() / counts.numel()
    return float(((counts - expected) ** 2 / expected).sum())


def test_all_offsets_and_flips_are_equally_likely() -> None:
    _, top, left, mirrored = random_array(81 * 2 * 200, size=1).loader(1, 0, train=True).draw()
    cell = (top * 9 + left) * 2 + mirrored
    assert cell.min() == 0 and cell.max() == 161
    # 161 degrees of freedom: 99.9 % of all draws lie below 222.
    assert chi_square(cell.bincount(minlength=162).double()) < 222


def test_every_image_is_equally_likely_at_every_position() -> None:
    loader = random_array(10, size=1).loader(10, 0, train=True)
    seen = torch.zeros(10, 10, dtype=torch.double)
    for epoch in range(2000):
        loader.set_epoch(epoch)
        seen[torch.arange(10), loader.draw()[0]] += 1
    # Rows and columns sum to 2000 each: 81 degrees of freedom, 99.9 % below 126.
    assert chi_square(seen) < 126


def test_without_flip_nothing_is_mirrored() -> None:
    assert not random_array(1000, size=1, flip=False).loader(1, 0, train=True).draw()[3].any()


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for one, two in zip(a, b) for x, y in zip(one, two))


def batches_of(loader: InMemoryLoader, epoch: int, start: int = 0) -> list:
    loader.set_epoch(epoch)
    return list(loader.iter_from(start))


def test_batches_depend_only_on_seed_and_epoch() -> None:
    data = random_array(40)
    first = batches_of(data.loader(16, 0, train=True, seed=1), 1)
    torch.manual_seed(99)
    other = data.loader(16, 0, train=True, seed=1)
    assert not same(first, batches_of(other, 2))
    assert same(first, batches_of(other, 1))
    assert not same(first, batches_of(data.loader(16, 0, train=True, seed=2), 1))


def test_the_loader_does_not_use_the_global_generator() -> None:
    state = torch.get_rng_state()
    list(random_array(8).loader(4, 0, train=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_an_epoch_can_be_resumed_at_any_batch(start: int) -> None:
    loader = random_array(40).loader(16, 0, train=True, seed=5)
    assert same(batches_of(loader, 4)[start:], batches_of(loader, 4, start))


def test_every_index_comes_once_an_epoch() -> None:
    loader = random_array(37).loader(8, 0, train=True)
    index = torch.cat([i for *_, i in loader])
    assert torch.equal(index.sort().values, torch.arange(37))
    assert len(loader) == 5


def test_to_keeps_the_batches() -> None:
    loader = random_array(8).loader(4, 0, train=True)
    before = batches_of(loader, 1)
    assert loader.to("cpu") is loader
    assert same(before, batches_of(loader, 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_gives_the_same_bits() -> None:
    data = random_array(40)
    on_cpu = list(data.loader(16, 0, train=True))
    on_gpu = list(data.loader(16, 0, train=True).to("cuda"))
    assert on_gpu[0][0].is_cuda
    assert same(on_cpu, [[x.cpu() for x in batch] for batch in on_gpu])


def test_select_takes_images_and_labels_together() -> None:
    data = random_array(10)
    keep = torch.tensor([7, 2])
    assert torch.equal(data.select(keep).images, data.images[keep])
    assert torch.equal(data.select(keep).targets, data.targets[keep])


def test_batch_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="batch size must be at least 1, it is 0"):
        random_array(4).loader(0, 0, train=True)


@pytest.mark.parametrize(("flip", "variants"), [(True, 162), (False, 81)])
def test_a_variant_has_the_same_pixels_in_every_epoch(flip: bool, variants: int) -> None:
    loader = random_array(4, size=8, flip=flip).loader(4, 0, train=True)
    assert loader.variants == variants
    seen: dict[tuple[int, int], torch.Tensor] = {}
    for epoch in range(600):
        loader.set_epoch(epoch)
        for image, _, index in loader:
            for picture, i, variant in zip(image, index.tolist(), loader.variant(index).tolist()):
                assert torch.equal(seen.setdefault((i, variant), picture), picture)
    # 2,400 draws: one of 162 variants is missed with a chance of 162 e^(-14.8), 6e-5.
    assert {v for _, v in seen} == set(range(variants))
    # Different variants have different pixels, because the images are noise.
    pictures = {(i, tuple(picture.flatten().tolist())) for (i, _), picture in seen.items()}
    assert len(pictures) == len(seen)


def test_variants_by_hand() -> None:
    loader = random_array(30).loader(8, 0, train=True, seed=2)
    _, top, left, mirrored = loader.draw()
    index = torch.tensor([5, 17, 5])
    assert loader.variant(index).tolist() == [int(top[i] * 18 + left[i] * 2 + mirrored[i]) for i in index]


def test_variants_are_the_same_on_every_rank() -> None:
    data, index = random_array(30), torch.arange(30)
    assert torch.equal(
        data.loader(8, 0, train=True).variant(index), data.loader(8, 0, train=True).shard(1, 2).variant(index)
    )


def test_images_of_an_epoch_are_those_of_its_batches() -> None:
    """Of each rank, in their order, but for those that the epoch leaves out; and any image alone has the same bits."""
    data = random_array(41)  # a short last batch of 9 images, of which two ranks leave out one
    for rank in range(2):
        loader = data.loader(16, 0, train=True, seed=3).shard(rank, 2)
        for epoch in (1, 5):
            loader.set_epoch(epoch)
            image, _, index = (torch.cat(items) for items in zip(*loader))
            assert torch.equal(loader.own_images(), index) and len(index) == 20
            assert torch.equal(loader.augmented(index), image)
            assert torch.equal(loader.augmented(index[7:8])[0], image[7])


def test_validation_has_no_variants() -> None:
    assert random_array(4).loader(4, 0, train=False).variants is None


def test_an_epoch_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = random_array(20).loader(8, 0, train=True)
    draws = []
    monkeypatch.setattr(loader, "draw", lambda draw=loader.draw: draws.append(1) or draw())
    for _, _, index in loader:
        loader.variant(index)
    assert len(draws) == 1
    loader.set_epoch(2)
    loader.variant(torch.tensor([0]))
    assert len(draws) == 2


def test_the_fingerprint_depends_on_data_and_augmentation() -> None:
    data = random_array(6)
    base = data.loader(2, 0, train=True).fingerprint
    assert base == data.loader(3, 0, train=True, seed=9).fingerprint  # the same pictures in another order
    images, targets = data.images.clone(), data.targets.clone()
    images[3, 5, 5, 1] ^= 1
    targets[2] += 1
    others = [
        ImageArray(images, data.targets, MEAN, STD).loader(2, 0, train=True),
        ImageArray(data.images, targets, MEAN, STD).loader(2, 0, train=True),
        ImageArray(data.images, data.targets, STD, MEAN).loader(2, 0, train=True),
        ImageArray(data.images, data.targets, MEAN, STD, CropFlip(flip=False)).loader(2, 0, train=True),
        data.loader(2, 0, train=False),
        ImageArray(data.images, data.targets, MEAN, STD, CropFlip(padding=3)).loader(2, 0, train=True),
    ]
    assert len({base, *(other.fingerprint for other in others)}) == 7
