"""What the numbers of an image mean: every mode of Pillow's to 8 bits a channel, and a check of tensors of pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError

# The formats whose integers Pillow gives as mode "I", scaled so that 65535 is white: the depth is 16 bits.
_SIXTEEN_BITS = ("PNG", "PPM")
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags of a TIFF file
_KINDS = {"I": "32-bit or signed integers", "F": "floats"}


class UnknownWhiteError(UserError):
    """Pixels of which no value is known to be white, so that they cannot be scaled."""


def to_rgb(image: Image.Image) -> Image.Image:
    """A Pillow image of any mode as RGB, 8 bits a channel; of several frames, the current one.

    Modes of 8 bits a channel and less are converted by Pillow, as torchvision's loader does, with the same bits; an
    alpha channel is dropped. Grey values of 16 (or, in TIFF, 12) bits are scaled, the largest one to 255, and rounded.
    Colours of 16 bits never come here: Pillow reads them as their upper 8 bits.

    Raises:
        UnknownWhiteError: floats, or integers of more than 16 bits or with a sign.
    """
    if image.mode == "RGB":
        return image
    if image.mode == "La":  # Pillow has no direct way
        image = image.convert("LA")
    if not image.mode.startswith(("I", "F")):
        return image.convert("RGB")
    values, full = np.asarray(image), _full_scale(image)
    if not 0 <= values.min() <= values.max() <= full:  # also for NaN
        kind = f"{_KINDS.get(image.mode, 'integers')} (mode {image.mode}) from {values.min():g} to {values.max():g}"
        raise UnknownWhiteError(f"its pixels are {kind}, and which value is white is not known")
    grey = ((values.astype(np.uint32) * 255 + full // 2) // full).astype(np.uint8)
    tags = getattr(image, "tag_v2", {})  # Pillow obeys this tag for 8 bits, not for 16
    scaled = Image.fromarray(255 - grey if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else grey).convert("RGB")
    scaled.info = dict(image.info)  # its EXIF block
    return scaled


def _full_scale(image: Image.Image) -> int:
    """The value of the brightest pixel that an image of mode I;16, I or F can hold; -1 if it is not known."""
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))
        return 2 ** bits[0] - 1
    return 65535 if image.mode == "I" and image.format in _SIXTEEN_BITS else -1


def check_pixels(pixels: Any, shape: str, name: str) -> None:
    """Refuse `pixels` unless they are a uint8 tensor of the `shape` "(N, H, W, 3)" or "(H, W, 3)".

    Args:
        name: what holds or returns them, for the message.

    Raises:
        UserError: says what they are (type, shape, range of values), and how to bring them to that form.
    """
    if isinstance(pixels, Tensor) and pixels.dtype == torch.uint8 and _fits(pixels.shape, shape):
        return
    found, steps = _of_tensor(pixels, shape) if isinstance(pixels, Tensor) else _of_other(pixels)
    raise UserError(
        f"{name} must be a uint8 tensor {shape}, values 0 to 255; x is {found}: use {', then '.join(steps)}"
    )


def _fits(found: tuple[int, ...], shape: str) -> bool:
    return len(found) == shape.count(",") + 1 and found[-1] == 3


def _of_other(pixels: Any) -> tuple[str, list[str]]:
    """What `pixels` are, which are no tensor, and the steps to the right form."""
    if isinstance(pixels, Image.Image):
        return f"a Pillow image of mode {pixels.mode}", ["torch.from_numpy(np.array(x.convert('RGB')))"]
    array = isinstance(pixels, np.ndarray)
    kind = f"a NumPy array of {pixels.dtype}" if array else f"of type {type(pixels).__name__}"
    return kind, ["torch.from_numpy(x)" if array else "a tensor"]


def _of_tensor(pixels: Tensor, shape: str) -> tuple[str, list[str]]:
    """What the tensor `pixels` is, and the steps to the right form."""
    found, steps = f"{str(pixels.dtype).removeprefix('torch.')} {tuple(pixels.shape)}", []
    if pixels.dtype == torch.bool:
        steps.append("x.to(torch.uint8) * 255")
    elif pixels.dtype != torch.uint8 and not pixels.numel():
        steps.append("x.to(torch.uint8)")
    elif pixels.dtype != torch.uint8:
        # NumPy does not know bfloat16, and PyTorch has no minimum of uint16.
        real = pixels.is_floating_point()
        values = (pixels.detach().float() if real else pixels).cpu().numpy()
        low, high = values.min().item(), values.max().item()
        found += f", values {low:g} to {high:g}"
        steps.append(_to_bytes(low, high, real))
    if not _fits(pixels.shape, shape):
        fault, step = _layout(tuple(pixels.shape), batch=shape.count(",") - 2)
        found += f", {fault}"
        steps.append(step)
    return found, steps


def _to_bytes(low: float, high: float, real: bool) -> str:
    """How to bring values from `low` to `high`, floats if `real`, to 0..255."""
    if real and 0 <= low <= high <= 1:
        return "(x * 255).round().to(torch.uint8)"
    if 0 <= low <= high <= 255:
        return "x.round().to(torch.uint8)" if real else "x.to(torch.uint8)"
    if not real and 0 <= low <= high <= 65535:
        return "(x.float() / 257).round().to(torch.uint8) if 65535 is white"
    return "x.round().to(torch.uint8) of values that go from 0 to 255, without any normalisation"


def _layout(found: tuple[int, ...], batch: int) -> tuple[str, str]:
    """What is wrong with the shape `found`, and how to bring it to (H, W, 3) behind `batch` dimensions (0 or 1)."""
    sizes = found[batch:]
    if len(sizes) == 2:
        return "without channels", "x[..., None].expand(*x.shape, 3)"
    one_to_three = f"expand({'-1, ' * (batch + 2)}3)"
    if len(sizes) == 3 and sizes[0] in (1, 3, 4) and sizes[-1] not in (1, 4):
        last = f"x.permute({', '.join(map(str, [*range(batch), batch + 1, batch + 2, batch]))})"
        return "channels first", f"{last}.{one_to_three}" if sizes[0] == 1 else last
    if len(sizes) == 3 and sizes[-1] == 1:
        return "one channel", f"x.{one_to_three}"
    if len(sizes) == 3 and sizes[-1] == 4:
        return "four channels", "x[..., :3] if the last one is alpha"
    return f"{len(found)} dimensions", f"x.reshape to {batch + 3} of them, the last one of size 3"
