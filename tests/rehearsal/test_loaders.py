"""What feeds the steps of the fake GPU: crops, rotations, negatives, files; without a wait, and the CPU's numbers."""

import pytest
import torch
import torch.nn as nn
from PIL import Image
from torchvision.transforms import v2

from mdistiller.dataset.augment import CropFlip, RotateFlip
from mdistiller.dataset.batch import host_index
from mdistiller.dataset.contrastive import ContrastiveSampler
from mdistiller.dataset.folders import ImageFiles, labelled_files
from mdistiller.dataset.image_file import read_pixels
from mdistiller.dataset.in_memory import ImageArray
from mdistiller.distillers import Distiller
from mdistiller.engine.batches import BatchReader, DrawnAhead
from mdistiller.engine.cfg import CFG
from mdistiller.engine.scores import evaluate

from ._fake_gpu import GPU, FakeGPU, GPUTensor

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)


def images(augment, count=20, size=8):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)
    return ImageArray(pixels, torch.arange(count) % 5, MEAN, STD, augment)


def held(batch):
    assert all(type(tensor) is GPUTensor for tensor in batch)
    return [tensor.held for tensor in batch]


def same(ours, theirs):
    return len(ours) == len(theirs) and all(torch.equal(a, b) for x, y in zip(ours, theirs) for a, b in zip(x, y))


@pytest.mark.parametrize("augment", [CropFlip(), CropFlip(padding=2, flip=False), RotateFlip(15, 8)], ids=str)
def test_augmented_batches(augment):
    theirs = [list(images(augment).loader(6, 0, train=True)) for _ in range(2)]
    with FakeGPU() as gpu:
        loader = images(augment).loader(6, 0, train=True).to("cuda")
        gpu.waits.clear()
        epochs = []
        for _ in range(2):
            batches = list(loader)
            epochs.append([held(batch) for batch in batches])
            if loader.variants:
                assert loader.variant(batches[0][2]).shape == (6,)
        assert gpu.waits == []
    assert same(epochs[0], theirs[0]) and len(theirs[0]) == 4
    assert not same(epochs[0], epochs[1])


def test_validation_waits_once_for_all_batches():
    with FakeGPU() as gpu:
        loader = images(CropFlip()).loader(4, 0, train=False).to("cuda")
        weight = torch.ones(3 * 8 * 8, 5).to("cuda")
        gpu.waits.clear()
        scores = evaluate(loader, lambda image: {"": image.flatten(1) @ weight}, GPU)
    assert [wait.place for wait in gpu.waits] == ["mdistiller/engine/scores.py evaluate"]
    assert scores[""].top5 == 100


@pytest.mark.parametrize("mode", ["exact", "relax"])
def test_contrastive_negatives_are_drawn_without_a_wait(mode):
    with FakeGPU() as gpu:
        loader = images(CropFlip()).loader(6, 0, train=True).to("cuda")
        drawn = DrawnAhead(ContrastiveSampler(loader.targets, 4, mode).to("cuda"))
        gpu.waits.clear()
        batches = [(drawn({"index": index}, 1).held, host_index(index).now) for _, _, index in loader]
        assert gpu.waits == []
    sampler = ContrastiveSampler(loader.targets, 4, mode)
    assert all(torch.equal(draws, sampler(index, 1)) for draws, index in batches)


class Reads(Distiller):
    needs_batch = ("index",)

    def __init__(self):
        super().__init__(nn.Linear(1, 1), nn.Identity())


def test_batches_of_a_loader_of_the_users_own_are_pinned():
    loader = list(images(CropFlip()).loader(6, 0, train=True))
    with FakeGPU() as gpu:
        reader = BatchReader(Reads(), loader, GPU, CFG)
        ours = [held(reader(batch, 1).values()) for batch in loader]
        assert gpu.waits == []
        evaluate(loader, lambda image: {"": image.mean((2, 3))[:, [0, 1, 2, 0, 1]]}, GPU)
    assert same(ours, loader)
    assert [wait.function for wait in gpu.waits if wait.file.startswith("mdistiller/")] == ["evaluate"]


@pytest.fixture
def files(tmp_path):
    for i in range(11):
        folder = tmp_path / "ab"[i % 2]
        folder.mkdir(exist_ok=True)
        pixels = torch.full((8, 8, 3), 20 * i, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i:02}.png")
    return ImageFiles.of(labelled_files(tmp_path, ["a", "b"]), v2.Compose([read_pixels]), read_pixels, MEAN, STD)


# Python 3.12 and later warn of fork() in a process with threads; torch's workers do just that.
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("train", [True, False])
def test_batches_from_files_come_from_pinned_memory(files, workers, train):
    theirs = list(files.loader(4, 0, train))
    with FakeGPU() as gpu:
        ours = [held(batch) for batch in files.loader(4, workers, train).to("cuda")]
    # The mean, the standard deviation and 255, at the first batch.
    assert [wait.place for wait in gpu.waits] == ["mdistiller/dataset/in_memory.py to"] * 3
    assert same(ours, theirs)
