"""Broken images: reported in one line or skipped, the same way in every run; nothing hangs."""

from __future__ import annotations

import os
import random
import resource
import struct
import subprocess
import sys
import time
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mdistiller.dataset import imagenet
from mdistiller.dataset.folders import FolderLoader, ImageFiles
from mdistiller.dataset.image_file import BrokenImageError, read_image, read_pixels, silent_pillow
from mdistiller.errors import UserError

MEAN, STD = (0.0,) * 3, (1.0,) * 3

# Python 3.12 and later warn of fork() in a process with threads; torch's workers do just that.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Twelve images of 4x4 pixels, grey 0, 1, ... 11; of these 3, 4 and 11 broken in three ways."""
    found = [tmp_path / f"{i}.png" for i in range(12)]
    for grey, path in enumerate(found):
        Image.new("L", (4, 4), grey).save(path)
    found[3].write_bytes(found[3].read_bytes()[:40])
    found[4].write_bytes(b"")
    found[11].unlink()
    return found


def loader_of(paths: list[Path], train: bool, workers: int = 0, skip_broken: bool = True) -> FolderLoader:
    files = [(str(path), i // 2) for i, path in enumerate(paths)]
    return ImageFiles.of(files, read_pixels, read_pixels, MEAN, STD, skip_broken).loader(5, workers, train, seed=1)


def greys(image: torch.Tensor) -> list[int]:
    return (image[:, 0, 0, 0] * 255).round().int().tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_training_replaces_broken_images_by_the_next_intact_ones(
    workers: int, paths: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    whole = loader_of([paths[0]] * 12, train=True)  # the same order
    stands_in = {3: 5, 4: 5, 11: 0}
    loader = loader_of(paths, True, workers)
    for _ in range(2):
        batches = list(loader)
        assert [len(target) for _, target, _ in batches] == [5, 5, 2]
        for (image, target, index), (_, _, wanted) in zip(batches, whole):
            assert index.tolist() == [stands_in.get(i, i) for i in wanted.tolist()]
            assert greys(image) == index.tolist() and torch.equal(target, index // 2)
        names = f"{paths[11]}, {paths[3]}, {paths[4]}"
        line = "warning: 3 of 12 images are broken and were replaced by the next intact ones (DATASET.SKIP_BROKEN): "
        assert capfd.readouterr().err == f"{line}{names}\n"
    assert sorted(loader.broken) == sorted(str(paths[i]) for i in (3, 4, 11))


def test_training_batches_stay_full_on_every_rank(paths: list[Path]) -> None:
    files = [(str(path), 0) for path in paths]
    data = ImageFiles.of(files, read_pixels, read_pixels, MEAN, STD, True)
    whole = list(data.loader(4, 0, train=True))
    ranks = [list(data.loader(4, 0, train=True).shard(r, 2)) for r in range(2)]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([rank[step][0] for rank in ranks]), batch[0])


@pytest.mark.parametrize("workers", [0, 1])
def test_validation_skips_broken_images(workers: int, paths: list[Path], capfd: pytest.CaptureFixture[str]) -> None:
    loader = loader_of(paths, False, workers)
    batches = list(loader)
    assert [greys(image) for image, _ in batches] == [[0, 1, 2], [5, 6, 7, 8, 9], [10]]
    assert [target.tolist() for _, target in batches] == [[0, 0, 1], [2, 3, 3, 4, 4], [5]]
    assert "3 of 12 images are broken and were left out (DATASET.SKIP_BROKEN)" in capfd.readouterr().err


def test_a_batch_of_only_broken_images_is_left_out(paths: list[Path]) -> None:
    batches = list(loader_of([paths[3]] * 5 + [paths[0]], train=False))
    assert [greys(image) for image, _ in batches] == [[0]]


def test_training_on_only_broken_images_is_refused(paths: list[Path]) -> None:
    with pytest.raises(UserError, match=r"none of the 2 training images can be read: .*[34].png cannot be read"):
        list(loader_of(paths[3:5], train=True))


def test_intact_images_give_no_warning(paths: list[Path], capfd: pytest.CaptureFixture[str]) -> None:
    list(loader_of(paths[5:9], train=True))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("train", [True, False])
def test_without_skip_broken_the_file_is_named_in_one_line(train: bool, workers: int, paths: list[Path]) -> None:
    with pytest.raises(UserError) as error:
        list(loader_of([paths[0], paths[3]], train, workers, skip_broken=False))
    message = str(error.value)
    assert message.startswith(f"{paths[3]} cannot be read as an image (") and "\n" not in message
    assert message.endswith("put an intact copy there, or set DATASET.SKIP_BROKEN True")


def test_grey_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    for mode, colour in (("L", 7), ("1", 0), ("P", 0), ("RGBA", (7, 7, 7, 0)), ("LA", (7, 0)), ("I;16", 7)):
        Image.new(mode, (4, 4), colour).save(tmp_path / "image.png")
        image = read_image(str(tmp_path / "image.png"))
        assert image.mode == "RGB" and read_pixels(str(tmp_path / "image.png")).shape == (4, 4, 3)
    Image.new("CMYK", (4, 4)).save(tmp_path / "image.jpg")
    assert read_image(str(tmp_path / "image.jpg")).getpixel((0, 0)) == (255, 255, 255)


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG whose header claims this size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    packed = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def jpeg(size: tuple[int, int] = (40, 30), **options: object) -> bytes:
    pixels = np.random.RandomState(size[0]).randint(0, 256, (size[1] // 5, size[0] // 5, 3)).astype(np.uint8)
    out = BytesIO()
    Image.fromarray(pixels).resize(size).save(out, "JPEG", **options)
    return out.getvalue()


def jpeg_of_size(width: int, height: int) -> bytes:
    """A small JPEG whose header claims this size."""
    content = jpeg()
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + struct.pack(">HH", height, width) + content[at + 4 :]


HUGE = [png(60_000, 60_000), png(2**31 - 1, 1), jpeg_of_size(65_500, 65_500), png(0, 0), png(1, 60_000, bytes(240_000))]


@pytest.mark.parametrize("content", HUGE)
def test_huge_sizes_in_the_header_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(content)
    start = time.process_time()
    with silent_pillow(), pytest.raises(BrokenImageError, match=r"image.png cannot be read as an image"):
        read_image(str(tmp_path / "image.png"))
    assert time.process_time() - start < 10  # nothing of that size is decoded


def test_no_external_program_is_started(tmp_path: Path) -> None:
    """Pillow would pass PostScript to Ghostscript, even in a file named .jpg."""
    path = tmp_path / "image.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    with Image.open(path) as image:
        assert image.format == "EPS"
    with pytest.raises(BrokenImageError, match="cannot identify image file"):
        read_image(str(path))


def test_a_pipe_or_a_folder_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for name in ("pipe.jpg", "folder.jpg"):
        with pytest.raises(BrokenImageError, match=f"{name} cannot be read as an image .it is not a regular file"):
            read_image(str(tmp_path / name))


WHOLE = [
    jpeg(), jpeg(progressive=True), jpeg((41, 31), quality=5), png(9, 5, bytes(28 * 5)),
    *(b"".join([b"P6 7 5 255\n", bytes(105)]) for _ in range(1)),
]  # fmt: skip
FORMATS = ("PNG", "BMP", "TIFF", "WEBP")
for name in FORMATS:
    encoded = BytesIO()
    Image.new("RGB", (12, 9), (200, 100, 50)).save(encoded, name)
    WHOLE.append(encoded.getvalue())


def flip_bits(content: bytes, seed: int) -> bytes:
    draw, damaged = random.Random(seed), bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 8, 64])):
        # Half of them in the first 100 bytes, where sizes and tables are.
        damaged[draw.randrange(min(len(content), draw.choice([100, len(content)])))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


whole = st.sampled_from(WHOLE)
sizes = st.sampled_from([0, 1, 40, 1_500, 20_000, 65_500])
damaged = st.one_of(
    st.builds(lambda content, part: content[: int(part * len(content))], whole, st.floats(0, 1)),
    st.builds(flip_bits, whole, st.integers(0, 2**32)),
    st.builds(lambda a, b, part: a[: int(part * len(a))] + b[int(part * len(b)) :], whole, whole, st.floats(0, 1)),
    st.builds(lambda w, h, make: make(w, h), sizes, sizes, st.sampled_from([png, jpeg_of_size])),
    st.binary(max_size=200),
    st.text(max_size=200).map(str.encode),
)


def test_500_damaged_images_work_or_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    outcomes = {"read": 0, "named": 0}
    path = tmp_path / "image.JPEG"
    files = ImageFiles.of([(str(path), 0)], imagenet.train_view, imagenet.val_view, MEAN, STD)
    loaders = {train: files.loader(1, 0, train) for train in (True, False)}

    @settings(max_examples=500, deadline=5000, database=None, suppress_health_check=list(HealthCheck))
    @given(damaged, st.booleans())
    def check(content: bytes, train: bool) -> None:
        path.write_bytes(content)
        try:
            image, *_ = next(iter(loaders[train]))
            assert image.shape == (1, 3, 224, 224)
            outcomes["read"] += 1
        except UserError as error:
            assert str(error).startswith(f"{path} cannot be read as an image") and "\n" not in str(error)
            outcomes["named"] += 1

    check()
    assert min(outcomes.values()) > 50 and sum(outcomes.values()) >= 500, outcomes
    assert capfd.readouterr() == ("", "")


def test_a_worker_s_warnings_stay_off_the_terminal(tmp_path: Path) -> None:
    """In a subprocess, because pytest captures warnings."""
    (tmp_path / "image.jpg").write_bytes(jpeg_of_size(10_000, 10_000))  # Pillow only warns of this size
    code = f"""if True:
        from mdistiller.console import log_to_terminal
        from mdistiller.dataset.folders import ImageFiles
        from mdistiller.dataset.image_file import read_pixels
        log_to_terminal()
        files = [({str(tmp_path / "image.jpg")!r}, 0)]
        data = ImageFiles.of(files, read_pixels, read_pixels, (0,) * 3, (1,) * 3, skip_broken=True)
        print(len(list(data.loader(1, 1, train=False))))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "0\n", done.stderr
    assert done.stderr.startswith("warning: 1 of 1 images are broken") and done.stderr.count("\n") == 1


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files through /proc")
@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_open_files_is_not_a_broken_image(paths: list[Path], workers: int) -> None:
    """Skipping broken images would leave out intact ones."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def view(path: str) -> torch.Tensor:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
        try:
            return read_pixels(path)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    data = ImageFiles.of([(str(paths[0]), 0)], view, view, MEAN, STD, skip_broken=True)
    with pytest.raises(UserError, match=r"open files.* `ulimit -n 65536`") as error:
        list(data.loader(1, workers, train=False))
    assert "\n" not in str(error.value) and not isinstance(error.value, BrokenImageError)
