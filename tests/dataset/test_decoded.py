"""The cache of decoded images: the pixels of the files, rebuilt whenever a file or the cache has changed."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mdistiller.dataset import decoded
from mdistiller.dataset.decoded import read_decoded
from mdistiller.errors import UserError


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Six noise images of 8x8."""
    rng = np.random.RandomState(0)
    found = [tmp_path / "train" / f"{i}.png" for i in range(6)]
    found[0].parent.mkdir()
    for path in found:
        Image.fromarray(rng.randint(0, 256, (8, 8, 3)).astype(np.uint8)).save(path)
    return [str(path) for path in found]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "train.npz"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are decoded from here on."""
    seen: list[str] = []
    read = decoded.read_pixels
    monkeypatch.setattr(decoded, "read_pixels", lambda path: seen.append(path) or read(path))
    return seen


def pillow(paths: list[str]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(Image.open(path).convert("RGB"))) for path in paths])


def test_decoded_once(paths: list[str], cache: Path, reads: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        images, whole = read_decoded(paths, 8, cache, False)
        assert torch.equal(images, pillow(paths)) and whole.tolist() == [0, 1, 2, 3, 4, 5]
    assert reads == paths
    assert capfd.readouterr().err == f"note: decoding 6 images, to cache them in {cache}\n"
    assert sorted(p.name for p in cache.parent.iterdir()) == ["train", "train.npz"]


def rewritten(paths: list[str]) -> list[str]:
    Image.new("RGB", (8, 8), (1, 2, 3)).save(paths[2])
    return paths


def touched(paths: list[str]) -> list[str]:
    os.utime(paths[1], (1, 1))
    return paths


def reordered(paths: list[str]) -> list[str]:
    return paths[::-1]


def shortened(paths: list[str]) -> list[str]:
    return paths[:-1]


@pytest.mark.parametrize("change", [rewritten, touched, reordered, shortened])
def test_changed_files_are_decoded_again(change, paths: list[str], cache: Path, reads: list[str]) -> None:
    read_decoded(paths, 8, cache, False)
    reads.clear()
    now = change(paths)
    images, _ = read_decoded(now, 8, cache, False)
    assert torch.equal(images, pillow(now)) and reads == now


def test_a_moved_folder_keeps_its_cache(paths: list[str], cache: Path, reads: list[str], tmp_path: Path) -> None:
    read_decoded(paths, 8, cache, False)
    reads.clear()
    (tmp_path / "new").mkdir()
    for name in ("train", "train.npz"):
        (tmp_path / name).rename(tmp_path / "new" / name)
    moved = [p.replace(str(tmp_path), str(tmp_path / "new")) for p in paths]
    assert torch.equal(read_decoded(moved, 8, tmp_path / "new" / "train.npz", False)[0], pillow(moved))
    assert not reads


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_a_damaged_cache_never_gives_other_pixels(
    paths: list[str], cache: Path, place: float, bit: int, cut: bool
) -> None:
    expected, _ = read_decoded(paths, 8, cache, False)
    content = bytearray(cache.read_bytes())
    at = int(place * len(content))
    content[at] ^= 1 << bit
    cache.write_bytes(content[:at] if cut else content)
    images, whole = read_decoded(paths, 8, cache, False)
    assert torch.equal(images, expected) and len(whole) == 6


@pytest.mark.parametrize("content", [b"", b"no zip", b"\x93NUMPY\x01\x00"])
def test_a_file_that_is_not_a_cache_is_rebuilt(
    content: bytes, paths: list[str], cache: Path, reads: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    cache.write_bytes(content)
    read_decoded(paths, 8, cache, False)
    assert f"note: {cache} is damaged" in capfd.readouterr().err
    reads.clear()
    read_decoded(paths, 8, cache, False)
    assert not reads


def test_a_cache_does_not_unpickle(paths: list[str], cache: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (tmp_path / "sprung").touch, ()

    np.savez(cache, key=np.array(Trap(), dtype=object), images=np.zeros(1), reasons=np.array([""]))
    assert torch.equal(read_decoded(paths, 8, cache, False)[0], pillow(paths))
    assert not (tmp_path / "sprung").exists()


def test_a_full_disk_is_reported_in_one_line(
    paths: list[str], cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The kernel's limit of the file size acts like a full disk."""
    before, limits = signal.getsignal(signal.SIGXFSZ), resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        images, _ = read_decoded(paths, 8, cache, False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert torch.equal(images, pillow(paths))
    assert capfd.readouterr().err.splitlines()[1:] == [
        f"note: {cache} cannot be written (File too large); the images are decoded again by the next run"
    ]
    assert [p.name for p in cache.parent.iterdir()] == ["train"]


def test_a_folder_that_cannot_be_written_to_is_no_error(paths: list[str], tmp_path: Path) -> None:
    images, _ = read_decoded(paths, 8, tmp_path / "nowhere" / "train.npz", False)
    assert torch.equal(images, pillow(paths))


def test_broken_images_are_named_or_left_out(
    paths: list[str], cache: Path, reads: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    Path(paths[1]).write_bytes(b"text")
    Image.new("RGB", (9, 8)).save(paths[4])
    with pytest.raises(UserError, match=rf"{paths[1]} cannot be read as an image .*set DATASET.SKIP_BROKEN True"):
        read_decoded(paths, 8, cache, False)
    assert not cache.exists()
    for _ in range(2):  # decoded, then from the cache
        images, whole = read_decoded(paths, 8, cache, True)
        assert whole.tolist() == [0, 2, 3, 5] and torch.equal(images, pillow([paths[i] for i in (0, 2, 3, 5)]))
        warning = f"warning: 2 of 6 images are broken and were left out (DATASET.SKIP_BROKEN): {paths[1]}, {paths[4]}"
        assert capfd.readouterr().err.splitlines()[-1] == warning
    reads.clear()
    with pytest.raises(UserError, match=f"{paths[1]} cannot be read"):
        read_decoded(paths, 8, cache, False)  # the cache holds the error
    assert not reads
    Path(paths[1]).unlink()
    with pytest.raises(UserError, match="No such file"):
        read_decoded(paths, 8, cache, False)


def test_a_wrong_size_is_reported(paths: list[str], cache: Path) -> None:
    Image.new("RGB", (9, 8)).save(paths[4])
    message = f"{paths[4]} has 9x8 pixels, expected 8x8; replace it, or set DATASET.SKIP_BROKEN True"
    with pytest.raises(UserError, match=message):
        read_decoded(paths, 8, cache, False)
