"""CIFAR-100: read, checked, and a download that fails quickly and in one line."""

from __future__ import annotations

import io
import pickle
import socket
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR100

from mdistiller.dataset import cifar100, get_cifar100_dataloaders, get_dataloaders
from mdistiller.errors import UserError

from ._server import serving


def make_cifar(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """A small data set in CIFAR-100's files (20 training and 10 test images), whose checksums count as right."""
    folder = root / CIFAR100.base_folder
    folder.mkdir(parents=True)
    pixels = {}
    for name, count in (("train", 20), ("test", 10)):
        pixels[name] = np.random.RandomState(count).randint(0, 256, (count, 3072)).astype(np.uint8)
        content = {"data": pixels[name], "fine_labels": [i % 100 for i in range(count)]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {99 - i}" for i in range(100)]}))
    sums = {name: md5((folder / name).read_bytes()).hexdigest() for name in ("train", "test", "meta")}
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": sums["meta"]})
    return pixels


def test_batches_hold_the_file_s_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = make_cifar(tmp_path, monkeypatch)
    train_loader, val_loader, count = get_cifar100_dataloaders(8, 4, 0, root=str(tmp_path))
    assert count == 20 and (len(train_loader), len(val_loader)) == (3, 3)
    image, target = next(iter(val_loader))
    assert target.tolist() == [0, 1, 2, 3]
    # The file holds a plane a channel: value 32 of plane 1 is row 1, column 0 of green.
    value = pixels["test"][0, 1024 + 32]
    assert float(image[0, 1, 1, 0]) == pytest.approx((value / 255 - 0.4867) / 0.2565, abs=1e-6)


def test_no_network_is_one_line_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(UserError) as error:
        get_dataloaders("cifar100", 8, 8, 0, str(tmp_path / "data"))
    message = str(error.value)
    assert "\n" not in message
    assert str(tmp_path / "data" / "cifar-100-python") in message
    assert "no network" in message and "DATASET.TYPE digits" in message
    assert capfd.readouterr() == ("", "")


def test_a_server_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(CIFAR100, "url", f"http://127.0.0.1:{server.getsockname()[1]}/cifar.tar.gz")
        monkeypatch.setattr(cifar100, "TIMEOUT", 0.2)
        with pytest.raises(UserError, match="timed out"):
            get_dataloaders("cifar100", 8, 8, 0, str(tmp_path))
    assert socket.getdefaulttimeout() is None


def test_a_damaged_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_cifar(tmp_path, monkeypatch)
    (tmp_path / "cifar-100-python" / "train").write_bytes(b"half a file")
    monkeypatch.setattr(CIFAR100, "url", "http://127.0.0.1:9/nobody-listens.tar.gz")
    with pytest.raises(UserError, match="checksum is wrong"):
        get_dataloaders("cifar100", 8, 8, 0, str(tmp_path))


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder behind a real server, where cifar-100-python.tar.gz is looked for."""
    with serving(tmp_path / "served") as address:
        monkeypatch.setattr(CIFAR100, "url", f"{address}/{CIFAR100.filename}")
        yield tmp_path / "served" / CIFAR100.filename


def pack(archive: Path, names: dict[str, bytes]) -> None:
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in names.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_an_archive_with_another_sum_is_not_unpacked(served: Path, tmp_path: Path) -> None:
    pack(served, {"cifar-100-python/train": b"anything"})
    with pytest.raises(UserError, match=r"the download failed .File not found or corrupted"):
        get_dataloaders("cifar100", 8, 8, 0, str(tmp_path / "data"))
    assert [p.name for p in (tmp_path / "data").rglob("*")] == [CIFAR100.filename]


@pytest.mark.parametrize("name", ["../outside", "/tmp/mdistiller-outside"])
def test_an_archive_writes_nothing_outside(
    name: str, served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even one whose checksum counts as right."""
    pack(served, {name: b"here I am"})
    monkeypatch.setattr(CIFAR100, "tgz_md5", md5(served.read_bytes()).hexdigest())
    with pytest.raises(UserError, match=r"the download failed .*has no file cifar-100-python/train"):
        get_dataloaders("cifar100", 8, 8, 0, str(tmp_path / "data"))
    assert not (tmp_path / "outside").exists() and not Path("/tmp/mdistiller-outside").exists()
    assert [p.name for p in (tmp_path / "data").iterdir()] == [CIFAR100.filename]


def test_an_archive_leads_nowhere_through_a_link(served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link in place of the folder, then files below it: refused by name, neither files nor link are made."""
    make_cifar(tmp_path / "made", monkeypatch)
    (tmp_path / "elsewhere").mkdir()
    with tarfile.open(served, "w:gz") as tar:
        link = tarfile.TarInfo(CIFAR100.base_folder)
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "elsewhere")
        tar.addfile(link)
        for path in (tmp_path / "made" / CIFAR100.base_folder).iterdir():
            tar.add(path, f"{CIFAR100.base_folder}/{path.name}")
    monkeypatch.setattr(CIFAR100, "tgz_md5", md5(served.read_bytes()).hexdigest())
    with pytest.raises(UserError, match=r"the download failed .*it holds 'cifar-100-python', a link to '.*elsewhere'"):
        get_dataloaders("cifar100", 8, 8, 0, str(tmp_path / "data"))
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert [p.name for p in (tmp_path / "data").iterdir()] == [CIFAR100.filename]


def test_a_right_archive_is_unpacked_and_read(served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_cifar(tmp_path / "made", monkeypatch)
    folder = tmp_path / "made" / CIFAR100.base_folder
    pack(served, {f"{CIFAR100.base_folder}/{path.name}": path.read_bytes() for path in folder.iterdir()})
    monkeypatch.setattr(CIFAR100, "tgz_md5", md5(served.read_bytes()).hexdigest())
    for _ in range(2):  # downloaded, then found there
        *_, count = get_dataloaders("cifar100", 8, 8, 0, str(tmp_path / "data"))
        assert count == 20
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == [CIFAR100.base_folder, CIFAR100.filename]
    (tmp_path / "data" / CIFAR100.base_folder / "train").write_bytes(b"half a file")
    *_, count = get_dataloaders("cifar100", 8, 8, 0, str(tmp_path / "data"))
    assert count == 20


@pytest.mark.skipif(
    not (Path(__file__).parents[2] / "data" / "cifar-100-python" / "test").is_file(), reason="needs CIFAR-100 in data/"
)
def test_real_test_set() -> None:
    data = cifar100.read(Path(__file__).parents[2] / "data", train=False)
    assert data.images.shape == (10000, 32, 32, 3)
    assert data.targets.bincount().tolist() == [100] * 100
    assert data.targets[:3].tolist() == [49, 33, 72]
    assert torch.equal(data.images[0, 0, 0], torch.tensor([199, 215, 249], dtype=torch.uint8))
