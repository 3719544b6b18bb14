"""Rotated batches equal torchvision's rotations of each image, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms import functional as TF

from mdistiller.dataset.augment import RotateFlip, rotate_and_flip, rotation
from mdistiller.dataset.in_memory import ImageArray

SAMPLE = Path(__file__).parents[3] / "shared" / "data" / "tiny-imagenet-200-sample"


def noise(count: int, height: int, width: int) -> Tensor:
    g = torch.Generator().manual_seed(height)
    return torch.randint(0, 256, (count, height, width, 3), generator=g, dtype=torch.uint8)


def by_torchvision(image: Tensor, degrees: float, mirrored: bool) -> Tensor:
    pil = TF.rotate(Image.fromarray(image.numpy()), degrees)
    return torch.from_numpy(np.array(TF.hflip(pil) if mirrored else pil))


def check(images: Tensor, degrees: Tensor, mirrored: Tensor) -> None:
    ours = rotate_and_flip(images, rotation(degrees, *images.shape[1:3]), mirrored)
    for i in range(len(images)):
        expected = by_torchvision(images[i], degrees[i].item(), bool(mirrored[i]))
        assert torch.equal(ours[i], expected), (i, degrees[i].item())


@pytest.mark.parametrize(("height", "width"), [(64, 64), (33, 33), (20, 47), (1, 5)])
def test_random_angles_equal_torchvision(height: int, width: int) -> None:
    g = torch.Generator().manual_seed(width)
    degrees = torch.empty(300).uniform_(-180, 180, generator=g).double()
    check(noise(300, height, width), degrees, torch.rand(300, generator=g) < 0.5)


def test_special_angles_equal_torchvision() -> None:
    degrees = torch.tensor([0, 20, -20, 45, -45, 1e-3, -1e-3, 60, 30, -30], dtype=torch.double)
    check(noise(10, 64, 64), degrees, torch.zeros(10).bool())


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="needs the Tiny-ImageNet sample")
def test_real_images_equal_torchvision_s_random_rotation() -> None:
    paths = sorted(SAMPLE.glob("train/*/images/*"))[::4]  # 500
    images = torch.stack([torch.from_numpy(np.array(Image.open(p).convert("RGB"))) for p in paths])
    theirs, degrees = [], []
    for i, image in enumerate(images):
        torch.manual_seed(i)
        theirs.append(torch.from_numpy(np.array(T.RandomRotation(20)(Image.fromarray(image.numpy())))))
        torch.manual_seed(i)
        degrees.append(T.RandomRotation.get_params([-20.0, 20.0]))
    matrix = rotation(torch.tensor(degrees, dtype=torch.double), 64, 64)
    assert torch.equal(rotate_and_flip(images, matrix, torch.zeros(len(images)).bool()), torch.stack(theirs))


def test_a_quarter_turn_by_hand() -> None:
    image = torch.tensor([[[1], [2]], [[3], [4]]], dtype=torch.uint8)[None].repeat(2, 1, 1, 1)
    # Counter-clockwise: 1 2 / 3 4 becomes 2 4 / 1 3; mirrored then 4 2 / 3 1.
    out = rotate_and_flip(image, rotation(torch.tensor([90.0, 90.0]), 2, 2), torch.tensor([False, True]))
    assert out[..., 0].tolist() == [[[2, 4], [1, 3]], [[4, 2], [3, 1]]]


def test_the_draws_are_uniform() -> None:
    matrix, mirrored = RotateFlip(20, 64).draw(20_000, torch.Generator().manual_seed(0))
    degrees = torch.asin(matrix[:, 4].double() / 65536).rad2deg()  # m4 is the angle's sine
    assert -20 <= degrees.min() < -19.9 and 19.9 < degrees.max() <= 20
    # Twenty bins of 1,000: 19 degrees of freedom, 99.9 % of all draws lie below 43.8.
    counts = torch.histc(degrees, 20, -20, 20)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 43.8
    assert abs(mirrored.double().mean() - 0.5) < 0.015  # four standard deviations


def test_batches_are_rotated_by_the_drawn_angles() -> None:
    data = ImageArray(noise(30, 16, 16), torch.arange(30), (0.0,) * 3, (1.0,) * 3, RotateFlip(20, 16))
    loader = data.loader(8, 0, train=True, seed=3)
    assert loader.variants is None
    _, matrix, mirrored = loader.draw()
    for image, _, index in loader:
        shown = rotate_and_flip(data.images[index], matrix[index], mirrored[index])
        assert torch.equal((image * 255).round().byte().permute(0, 2, 3, 1), shown)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_rotates_to_the_same_bits() -> None:
    data = ImageArray(noise(30, 16, 16), torch.arange(30), (0.0,) * 3, (1.0,) * 3, RotateFlip(20, 16))
    on_cpu, on_gpu = (list(data.loader(8, 0, train=True, seed=3).to(device)) for device in ("cpu", "cuda"))
    assert all(torch.equal(a, b.cpu()) for one, two in zip(on_cpu, on_gpu) for a, b in zip(one, two))
