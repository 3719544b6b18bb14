"""DATASET.AUGMENT fixmatch: every operation is Pillow's, and near torchvision's; the square; what is drawn."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torchvision.transforms.v2 import functional as TF

from mdistiller.dataset.augment import CropFlip
from mdistiller.dataset.augmentation import OnTop, weak_and_strong
from mdistiller.dataset.fixmatch import DRAWS, GREY, OPERATIONS, apply, draw, grey_square
from mdistiller.dataset.policies import POLICIES, apply_policy, draw_policy


def smooth(count, height, width):
    small = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(count))
    images = F.interpolate(small, (height, width), mode="bilinear").mul(255).byte().permute(0, 2, 3, 1).contiguous()
    images[0] = 77  # flat: nothing to stretch or to spread
    images[1, ..., 1] = 200
    return images


def affine(image, *matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


PILLOW = {
    "autocontrast": lambda image, v: ImageOps.autocontrast(image),
    "brightness": lambda image, v: ImageEnhance.Brightness(image).enhance(v),
    "colour": lambda image, v: ImageEnhance.Color(image).enhance(v),
    "contrast": lambda image, v: ImageEnhance.Contrast(image).enhance(v),
    "equalize": lambda image, v: ImageOps.equalize(image),
    "identity": lambda image, v: image,
    "posterize": lambda image, v: ImageOps.posterize(image, int(v)),
    "rotate": lambda image, v: image.rotate(v),
    "sharpness": lambda image, v: ImageEnhance.Sharpness(image).enhance(v),
    "shear x": lambda image, v: affine(image, 1, v, 0, 0, 1, 0),
    "shear y": lambda image, v: affine(image, 1, 0, 0, v, 1, 0),
    "solarize": lambda image, v: ImageOps.solarize(image, v),
    "translate x": lambda image, v: affine(image, 1, 0, v * image.size[0], 0, 1, 0),
    "translate y": lambda image, v: affine(image, 1, 0, 0, 0, 1, v * image.size[1]),
}


def pillow(image):
    return Image.fromarray(image.numpy())


def pixels(image):
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.size[1], image.size[0], 3)


@pytest.mark.parametrize("height, width", [(32, 32), (24, 40)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_pillows(name, height, width):
    operation, low, high = OPERATIONS[name]
    images = smooth(40, height, width)
    strength = low + (high - low) * torch.rand(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shown = operation(images, strength)
    for image, v, result in zip(images, strength.tolist(), shown):
        expected = pixels(PILLOW[name](pillow(image), v))
        assert torch.equal(result, expected), (name, v)
    if name != "identity":
        assert (shown != images).flatten(1).any(1).double().mean() > 0.5


TORCHVISION = {
    "autocontrast": lambda image, v: TF.autocontrast(image),
    "brightness": TF.adjust_brightness,
    "colour": TF.adjust_saturation,
    "contrast": TF.adjust_contrast,
    "equalize": lambda image, v: TF.equalize(image),
    "posterize": lambda image, v: TF.posterize(image, int(v)),
    "sharpness": TF.adjust_sharpness,
    "solarize": TF.solarize,
    "rotate": TF.rotate,
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_an_operation_is_within_two_levels_of_torchvisions(name):
    """The directions of turning and moving too; torchvision's own rounding differs from Pillow's."""
    operation, low, high = OPERATIONS[name]
    images = smooth(20, 32, 32)
    strength = low + (high - low) * torch.rand(20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for image, v, result in zip(images, strength.tolist(), operation(images, strength)):
        other = TORCHVISION[name](image.permute(2, 0, 1), v).permute(1, 2, 0)
        assert ((result.int() - other.int()).abs() <= 2).double().mean() > 0.97, (name, v)


def test_the_square_is_pillows_rectangle():
    images, uniform = smooth(200, 32, 40), torch.rand(3, 200, generator=torch.Generator().manual_seed(3)).double()
    for image, size, column, row, result in zip(images, *uniform.tolist(), grey_square(images, *uniform)):
        side = size * 0.5 * 40
        x, y = int(max(0, column * 40 - side / 2)), int(max(0, row * 32 - side / 2))
        expected = pillow(image)
        ImageDraw.Draw(expected).rectangle((x, y, min(40, x + side), min(32, y + side)), GREY)
        assert torch.equal(result, pixels(expected))


def test_operations_and_strengths_are_drawn_uniformly():
    draws = draw(14_000, torch.Generator().manual_seed(1))
    assert draws.shape == (14_000, DRAWS)
    for number in draws[:, :2].long().unbind(1):
        counts = number.bincount(minlength=14).double()
        assert len(counts) == 14 and ((counts - 1000) ** 2 / 1000).sum() < 34.5  # 13 degrees of freedom: 99.9 %
    for uniform in draws[:, 2:].unbind(1):
        assert uniform.min() >= 0 and uniform.max() < 1
        assert (uniform.sort().values - torch.linspace(0, 1, 14_000)).abs().max() < 1.95 / 14_000**0.5  # Kolmogorov


def test_every_image_is_changed_by_its_own_draws():
    images, draws = smooth(64, 32, 32), draw(64, torch.Generator().manual_seed(1))
    shown = apply(images, draws)
    names = list(OPERATIONS)
    for image, own, result in zip(images, draws, shown):
        for number, uniform in zip(own[:2].long().tolist(), own[2:4].tolist()):
            operation, low, high = OPERATIONS[names[number]]
            strength = torch.tensor([low + (high - low) * uniform], dtype=torch.float64)
            image = operation(image[None], strength)[0]
        assert torch.equal(result, grey_square(image[None], *own[4:, None])[0])


def test_it_is_a_policy_and_that_of_the_strong_view():
    assert "fixmatch" in POLICIES
    images = smooth(8, 32, 32)
    torch.manual_seed(4)
    shown = apply_policy("fixmatch", images[3])
    assert torch.equal(shown, apply(images[3:4], draw_policy("fixmatch", 1, torch.Generator().manual_seed(4)))[0])
    assert weak_and_strong(CropFlip()) == (CropFlip(), OnTop(CropFlip(), "fixmatch"))
