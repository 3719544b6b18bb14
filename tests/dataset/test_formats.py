"""Image formats: what Pillow decodes on its own, by the ending of the name, and never by starting a program."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from mdistiller.dataset.formats import COMMON, REFUSED, formats_of, image_suffixes, suffix_of
from mdistiller.dataset.image_file import BrokenImageError, read_image
from mdistiller.dataset.listing import labelled_files

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
# By name, with the ending that Pillow's writer expects.
SAVED = ("a.gif", "a.GIF", "a.jp2", "a.tga", "a.jfif", "a.JPG", "a.qoi", "a.pcx", "a.dib", "a.ico", "a.mpo", "a.apng")


def test_all_endings_of_torchvision_and_no_others_than_pillow_s() -> None:
    assert set(IMG_EXTENSIONS) <= image_suffixes() <= {*Image.registered_extensions()}
    assert not image_suffixes() & {".eps", ".ps", ".pdf", ".iim", ".h5", ".mpg", ".wmf", ".heic", ".txt", ""}


def test_endings() -> None:
    names = ("a.JPEG", "a.b.png", "a", ".png", "a.")
    assert [suffix_of(name) for name in names] == [".jpeg", ".png", "", ".png", "."]


@pytest.mark.parametrize("name", SAVED)
def test_what_pillow_writes_is_found_and_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    Image.new("RGB", (32, 32), (250, 0, 0)).save(tmp_path / "class" / name)
    [(path, _)] = labelled_files(tmp_path, ["class"])
    red, green, blue = read_image(path).getpixel((5, 5))
    assert red > 240 and green < 10 and blue < 10


@pytest.mark.skipif(".avif" not in image_suffixes(), reason="needs a Pillow with AVIF")
def test_avif(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (250, 0, 0)).save(tmp_path / "a.avif")
    assert read_image(str(tmp_path / "a.avif")).getpixel((5, 5))[0] > 240


def test_the_first_frame_of_several_is_read(tmp_path: Path) -> None:
    frames = [Image.new("L", (8, 8), grey) for grey in (10, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_image(str(tmp_path / "a.gif")).getpixel((0, 0)) == (10, 10, 10)


def test_common_formats_are_recognised_under_any_name_and_others_under_their_own(tmp_path: Path) -> None:
    for kind in ("GIF", "PNG"):
        Image.new("L", (8, 8), 9).save(tmp_path / "a.JPEG", kind)
        assert read_image(str(tmp_path / "a.JPEG")).size == (8, 8)
    Image.new("L", (8, 8), 9).save(tmp_path / "a.JPEG", "TGA")
    with pytest.raises(BrokenImageError, match="cannot identify image file"):
        read_image(str(tmp_path / "a.JPEG"))
    assert formats_of("a.tga") == (*formats_of("a.jpg"), "TGA") and formats_of("a.jpg")[0] == COMMON[0] == "JPEG"


def test_no_format_is_read_that_starts_a_program_or_opens_a_file_of_another_format() -> None:
    for suffix in image_suffixes():
        for name in formats_of("a" + suffix):
            assert name not in REFUSED
            module = sys.modules[Image.OPEN[name][0].__module__]
            read = [line for line in inspect.getsource(module).splitlines() if "Image.open(" in line]
            # JpegImagePlugin.load_djpeg is called by nobody, GifImagePlugin's programs write files, and Icns's line is
            # of its main().
            if name not in ("JPEG", "GIF", "ICNS", "WEBP"):
                assert not read and "subprocess" not in inspect.getsource(module), name


@pytest.mark.parametrize("name", ["a.eps", "a.ps", "a.jpg", "a.gif", "a.iim", "a"])
def test_postscript_is_never_read(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(EPS)
    with pytest.raises(BrokenImageError, match="cannot identify image file"):
        read_image(str(tmp_path / name))
