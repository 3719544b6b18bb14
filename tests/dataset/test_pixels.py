"""Pixels of every mode become RGB of 8 bits; floats, other integers and other shapes are refused by name."""

from __future__ import annotations

import struct
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mdistiller.dataset.decoded import read_decoded
from mdistiller.dataset.folders import ImageFiles
from mdistiller.dataset.image_file import BrokenImageError, read_image, read_pixels, silent_pillow
from mdistiller.dataset.in_memory import ImageArray
from mdistiller.dataset.pixels import UnknownWhiteError, to_rgb
from mdistiller.errors import UserError

# Python 3.12 and later warn of fork() in a process with threads; torch's workers do just that.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

RAMP = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
RAMP[-1, -1] = 65535
GREY = np.rint(RAMP / 257).astype(np.uint8)  # 65535 is white, 255
NOISE = np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)
NOISE[0, 0, :3], NOISE[-1, -1, :3] = 0, 255


def png16(pixels: np.ndarray, colour_type: int) -> bytes:
    """A PNG of 16 bits a channel; Pillow writes grey ones only."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    packed = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def tiff(data: bytes, bits: int, kind: int = 1, photometric: int = 1, order: str = "<") -> bytes:
    """A grey TIFF of 64x64 pixels. kind: 1 unsigned, 2 signed, 3 float; photometric: 0 for a white that is 0."""
    tags = [(256, 64), (257, 64), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 64)]
    tags += [(279, len(data)), (339, kind)]
    entries = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    mark = b"II" if order == "<" else b"MM"
    head = struct.pack(f"{order}2sHI", mark, 42, 8 + len(data))
    return head + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


def packed_12(values: np.ndarray) -> bytes:
    first, second = values.ravel().astype(int).reshape(-1, 2).T
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()


def big(values: np.ndarray) -> bytes:
    return values.astype(">u2").tobytes()


def little(values: np.ndarray) -> bytes:
    return values.astype("<u2").tobytes()


KNOWN = {
    "grey.png": png16(RAMP, 0),
    "little.tif": tiff(little(RAMP), 16),
    "big.tif": tiff(big(RAMP), 16, order=">"),
    "white_is_zero.tif": tiff(little(65535 - RAMP), 16, photometric=0),
    "grey.pgm": b"P5 64 64 65535\n" + big(RAMP),
    "plain.pgm": b"P2 64 64 65535\n" + b" ".join(str(value).encode() for value in RAMP.ravel()),
}
ROUNDED = {  # fewer bits than the ramp has, or upper 8 bits taken by Pillow
    "12_bits.tif": tiff(packed_12(RAMP >> 4), 12),
    "10_bits.pgm": b"P5 64 64 1023\n" + big(RAMP >> 6),
    "colour.png": png16(np.stack([RAMP] * 3, 2), 2),
    "alpha.png": png16(np.stack([RAMP] * 2, 2), 4),
    "colour.ppm": b"P6 64 64 65535\n" + big(np.stack([RAMP] * 3, 2)),
}


@pytest.mark.parametrize("name", KNOWN | ROUNDED)
def test_16_bits_are_scaled(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes((KNOWN | ROUNDED)[name])
    pixels = read_pixels(str(tmp_path / name)).numpy()
    assert pixels.shape == (64, 64, 3) and (pixels == pixels[:, :, :1]).all()
    difference = np.abs(pixels[:, :, 0].astype(int) - GREY)
    assert difference.max() <= (0 if name in KNOWN else 1)
    assert (pixels.min(), pixels.max()) == (0, 255) and len(np.unique(pixels)) == 256


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
def test_16_bits_that_pillow_has_written(compression: str | None, tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / "a.tif", compression=compression)
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    for name in ("a.tif", "a.png"):
        assert (read_pixels(str(tmp_path / name)).numpy() == GREY[:, :, None]).all()


def test_8_bits_written_with_16_come_back_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png16(GREY.astype(np.uint16) * 257, 0))
    assert (read_pixels(str(tmp_path / "a.png")).numpy() == GREY[:, :, None]).all()


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_every_byte_order(mode: str) -> None:
    data = big(RAMP) if mode == "I;16B" else RAMP.tobytes() if mode == "I;16N" else little(RAMP)
    assert (np.array(to_rgb(Image.frombytes(mode, (64, 64), data))) == GREY[:, :, None]).all()


UNKNOWN = {
    "floats.tif": (tiff((RAMP / 65535).astype("<f4").tobytes(), 32, 3), r"floats .mode F. from 0 to 1,"),
    "wide_floats.tif": (tiff(RAMP.astype("<f4").tobytes(), 32, 3), "from 0 to 65535"),
    "nan.tif": (tiff(np.where(RAMP, np.nan, 0).astype("<f4").tobytes(), 32, 3), "from nan to nan"),
    "floats.pfm": (b"Pf\n64 64\n-1.0\n" + (RAMP / 65535).astype("<f4").tobytes(), "floats"),
    "signed.tif": (tiff((RAMP >> 1).astype("<i2").tobytes(), 16, 2), r"or signed integers .mode I. from 0 to 32767"),
    "32_bits.tif": (tiff((RAMP.astype("<u4") * 32768).tobytes(), 32), r"integers .mode I. from 0 to 2.14745e.09"),
    "small_32_bits.tif": (tiff((RAMP.astype("<u4") >> 8).tobytes(), 32), "from 0 to 255"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_has_no_known_white_is_refused_by_name(name: str, tmp_path: Path) -> None:
    content, values = UNKNOWN[name]
    path = tmp_path / name
    path.write_bytes(content)
    message = rf"{path} cannot be read as an image .its pixels are .*{values}"
    with pytest.raises(BrokenImageError, match=message) as error:
        read_image(str(path))
    assert str(error.value).endswith("which value is white is not known); save it with 8 or 16 bits a channel")
    files = ImageFiles.of([(str(path), 0)] * 2, read_pixels, read_pixels, [0] * 3, [1] * 3)
    with pytest.raises(UserError, match=f"{name} cannot be read .*bits a channel, or set DATASET.SKIP_BROKEN True"):
        list(files.loader(2, 0, train=False))


def test_an_image_in_memory_whose_depth_is_not_known() -> None:
    for mode in ("I", "F"):
        with pytest.raises(UnknownWhiteError, match=rf"mode {mode}. from 7 to 7, and which value is white"):
            to_rgb(Image.new(mode, (2, 2), 7))


EIGHT_BITS = ["1", "L", "LA", "P", "PA", "RGB", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr", "LAB", "HSV"]


@pytest.mark.parametrize("mode", EIGHT_BITS)
def test_modes_of_8_bits_keep_pillow_s_bits(mode: str) -> None:
    image = Image.fromarray(NOISE[:, :, :3]).convert("RGBA" if mode == "RGBa" else "RGB").convert(mode)
    assert np.array_equal(np.array(to_rgb(image)), np.array(image.convert("RGB")))


def test_alpha_is_dropped_as_pillow_drops_it(tmp_path: Path) -> None:
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    assert np.array_equal(read_pixels(str(tmp_path / "a.png")).numpy(), NOISE[:, :, :3])
    palette = Image.fromarray(NOISE[:, :, 0]).convert("P")
    palette.save(tmp_path / "p.png", transparency=bytes(range(256)))
    with Image.open(tmp_path / "p.png") as saved:
        assert saved.mode == "P" and "transparency" in saved.info
    with silent_pillow():  # as every loader does
        pixels = read_pixels(str(tmp_path / "p.png"))
    assert np.array_equal(pixels.numpy(), np.array(palette.convert("RGB")))
    assert to_rgb(Image.new("La", (2, 2))).mode == "RGB"  # a grey TIFF with premultiplied alpha


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif"])
def test_the_first_frame_of_several(name: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), (shade,) * 3) for shade in (10, 200)]
    lossless = {"lossless": True} if name == "a.webp" else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **lossless)
    assert read_pixels(str(tmp_path / name)).unique().tolist() == [10]


def oriented(path: Path, image: Image.Image, orientation: int) -> str:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif, quality=95)
    return str(path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
def test_upright_as_the_exif_block_says(mode: str, orientation: int, tmp_path: Path) -> None:
    """By hand: orientation 6 shows the first column as the first row, reversed; as read, the file is unchanged."""
    grid = np.arange(48, dtype=np.uint8).reshape(8, 6) * 5
    image = Image.fromarray(grid.astype(np.uint16) * 257 if mode == "I;16" else grid)
    path = oriented(tmp_path / "a.png", image.convert("RGB") if mode == "RGB" else image, orientation)
    shown = {
        1: grid, 2: grid[:, ::-1], 3: grid[::-1, ::-1], 4: grid[::-1], 5: grid.T, 6: grid[::-1].T,
        7: grid[::-1, ::-1].T, 8: grid[:, ::-1].T,
    }  # fmt: skip
    assert np.array_equal(read_pixels(path)[:, :, 0].numpy(), grid)
    assert np.array_equal(read_pixels(path, upright=True)[:, :, 0].numpy(), shown[orientation])
    data = ImageFiles.of([(path, 0)], read_pixels, partial(read_pixels, upright=True), [0] * 3, [1] * 3)
    ((image_batch, _),) = data.loader(1, 0, train=False)
    assert image_batch.shape[2:] == shown[orientation].shape


def test_upright_jpegs_and_damaged_exif_blocks(tmp_path: Path) -> None:
    path = Path(oriented(tmp_path / "a.jpg", Image.fromarray(NOISE[:, :, :3]), 6))
    assert read_image(str(path)).size == (7, 9) and read_image(str(path), upright=True).size == (9, 7)
    content = path.read_bytes()
    at = content.index(b"Exif\0\0") + 6
    path.write_bytes(content[:at] + b"\xff" * 12 + content[at + 12 :])
    assert read_image(str(path), upright=True).size == (7, 9)
    Image.fromarray(NOISE[:, :, :3]).save(tmp_path / "none.jpg")
    assert read_image(str(tmp_path / "none.jpg"), upright=True).size == (7, 9)


def test_a_cache_of_before_16_bits_were_scaled_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.png").write_bytes(KNOWN["grey.png"])
    paths, cache = [str(tmp_path / "train" / "a.png")], tmp_path / "train.npz"
    with monkeypatch.context() as before:
        before.setattr("mdistiller.dataset.decoded.READING", b"")
        before.setattr("mdistiller.dataset.decoded.read_pixels", lambda path: torch.full((64, 64, 3), 255).byte())
        read_decoded(paths, 64, cache, False)
    assert read_decoded(paths, 64, cache, False)[0][0, :, :, 0].tolist() == GREY.tolist()


BYTES = torch.from_numpy(NOISE[None, :, :, :3].copy())
SCALED = "(x * 255).round().to(torch.uint8)"
ARRAYS = {
    "float32 (1, 9, 7, 3), values 0 to 1: use (x * 255).round().to(torch.uint8)": BYTES / 255.0,
    "float64 (1, 9, 7, 3), values 0 to 255: use x.round().to(torch.uint8)": BYTES.double(),
    "bfloat16 (1, 9, 7, 3), values 0 to 1: use (x * 255).round().to(torch.uint8)": (BYTES / 255).bfloat16(),
    "float32 (1, 9, 7, 3), values -1 to 1: use x.round().to(torch.uint8) of values that": BYTES / 127.5 - 1,
    "float32 (1, 9, 7, 3), values nan to nan: use": BYTES * torch.nan,
    "bool (1, 9, 7, 3): use x.to(torch.uint8) * 255": BYTES > 9,
    "int64 (1, 9, 7, 3), values 0 to 255: use x.to(torch.uint8)": BYTES.long(),
    "int16 (1, 9, 7, 3), values -128 to 127: use": BYTES.short() - 128,
    "int32 (1, 9, 7, 3), values 0 to 65535: use (x.float() / 257).round().to(torch.uint8) if": BYTES.int() * 257,
    "uint16 (1, 9, 7, 3), values 0 to 65535: use (x.float() / 257).round()": (BYTES.int() * 257).to(torch.uint16),
    "uint8 (1, 3, 9, 7), channels first: use x.permute(0, 2, 3, 1)": BYTES.permute(0, 3, 1, 2),
    f"float32 (1, 3, 9, 7), values 0 to 1, channels first: use {SCALED}, then x.permute(0, 2, 3, 1)":
        BYTES.permute(0, 3, 1, 2) / 255,
    "uint8 (1, 1, 9, 7), channels first: use x.permute(0, 2, 3, 1).expand(-1, -1, -1, 3)": BYTES[None, :, :, :, 0],
    "uint8 (1, 9, 7), without channels: use x[..., None].expand(*x.shape, 3)": BYTES[..., 0],
    "uint8 (1, 9, 7, 1), one channel: use x.expand(-1, -1, -1, 3)": BYTES[..., :1],
    "uint8 (1, 9, 7, 4), four channels: use x[..., :3] if the last one is alpha": torch.from_numpy(NOISE)[None],
    "uint8 (189,), 1 dimensions: use x.reshape to 4 of them, the last one of size 3": BYTES.flatten(),
    "float32 (0, 9, 7, 3): use x.to(torch.uint8)": BYTES[:0].float(),
    "a NumPy array of uint8: use torch.from_numpy(x)": NOISE[None],
    "of type list: use a tensor": [[[[0, 0, 0]]]],
}  # fmt: skip


@pytest.mark.parametrize("message", ARRAYS)
def test_an_array_of_other_pixels_is_refused_with_the_remedy(message: str) -> None:
    images = ARRAYS[message]
    with pytest.raises(UserError) as error:
        ImageArray(images, torch.zeros(len(images)).long(), [0] * 3, [1] * 3)  # type: ignore[arg-type]
    start = "ImageArray.images must be a uint8 tensor (N, H, W, 3), values 0 to 255; x is "
    assert str(error.value).startswith(start + message) and "\n" not in str(error.value)


@pytest.mark.parametrize("message", [m for m in ARRAYS if "use" in m and "if" not in m and "values that" not in m])
def test_the_remedy_works(message: str) -> None:
    """What the message says, done, gives the images in their right form."""
    x = ARRAYS[message]
    for step in message.split(": use ", 1)[-1].split(", then "):
        if step.startswith(("(x", "x.p", "x.e", "x.r", "x.t", "x[", "torch")) and "reshape" not in step:
            x = eval(step, {"x": x, "torch": torch})  # the messages above
    if not any(word in message for word in ("nan", "int16", "type list", "dimensions", "NumPy")):
        assert ImageArray(x, torch.zeros(len(x)).long(), [0] * 3, [1] * 3).images.shape[1:] == (9, 7, 3)


def test_an_empty_split_in_memory() -> None:
    data = ImageArray(BYTES[:0], torch.zeros(0).long(), [0] * 3, [1] * 3)
    assert list(data.loader(4, 0, train=False)) == []


VIEWS = {
    "float32 (3, 64, 64), values 0 to 1, channels first: use (x * 255).round()":
        lambda path: read_pixels(path).permute(2, 0, 1) / 255,
    "uint8 (3, 64, 64), channels first: use x.permute(1, 2, 0)": lambda path: read_pixels(path).permute(2, 0, 1),
    "a Pillow image of mode RGB: use torch.from_numpy(np.array(x.convert('RGB')))": read_image,
    "a NumPy array of uint8: use torch.from_numpy(x)": lambda path: read_pixels(path).numpy(),
}  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("message", VIEWS)
def test_a_view_that_returns_another_form_is_named(message: str, train: bool, workers: int, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(KNOWN["grey.png"])
    views = (VIEWS[message], read_pixels) if train else (read_pixels, VIEWS[message])
    data = ImageFiles.of([(str(path), 0)] * 4, *views, [0] * 3, [1] * 3, skip_broken=True)
    with pytest.raises(UserError) as error:
        list(data.loader(2, workers, train))
    name = f"ImageFiles.{'train' if train else 'val'}_view, for {path},"
    assert str(error.value).startswith(f"{name} must be a uint8 tensor (H, W, 3), values 0 to 255; x is {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_views_of_several_sizes_are_named(workers: int, tmp_path: Path) -> None:
    for i, size in enumerate((4, 5)):
        Image.new("RGB", (size, 4)).save(tmp_path / f"{i}.png")
    files = [(str(tmp_path / f"{i}.png"), 0) for i in range(2)]
    data = ImageFiles.of(files, read_pixels, read_pixels, [0] * 3, [1] * 3)
    message = r"val_view, for .*1\.png, returns \(4, 5, 3\) after \(4, 4, 3\) for another file; .*resize them in"
    with pytest.raises(UserError, match=message):
        list(data.loader(2, workers, train=False))
