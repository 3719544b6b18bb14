"""The loader benchmark: both loaders yield the same images, and no number is missing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from ._scripts import script

# Python 3.12 and later warn of fork() in a process with threads; torch's workers do just that.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture(scope="module")
def loader() -> Iterator[ModuleType]:
    with script("loader") as module:
        yield module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve JPEGs in three class folders."""
    rng = np.random.RandomState(0)
    for i in range(12):
        path = tmp_path / f"n{i % 3}" / f"{i}.JPEG"
        path.parent.mkdir(exist_ok=True)
        small = Image.fromarray(rng.randint(0, 256, (6, 8, 3)).astype(np.uint8))
        small.resize((320, 240), Image.Resampling.BICUBIC).save(path)
    return tmp_path


def test_validation_equals_the_classic_pipeline_bit_for_bit(loader: ModuleType, folder: Path) -> None:
    classic = list(loader.imagenet_loader(folder, 12, 5, 0, train=False))
    ours = list(loader.image_files(folder).loader(5, 0, train=False))
    assert [len(target) for _, target in ours] == [5, 5, 2]
    for mine, theirs in zip(ours, classic):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs))


def test_a_whole_benchmark(loader: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    words = f"loader.py --data {folder} --batch 3 --workers 1 --rounds 2 --staged 4"
    monkeypatch.setattr("sys.argv", [*words.split(), "--json"])
    loader.main()
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == 12 and result["rounds"] == 2
    for split in ("train", "val"):
        for kind in ("classic", "ours", "ratio"):
            numbers = result["images_per_second"][split][kind]
            assert 0 < numbers["low"] <= numbers["median"] <= numbers["high"]
        for stage in ("read", "read and decode", "transform", "to float", "collate"):
            assert result["milliseconds"][f"{split}/ours/{stage}"]["median"] > 0
    assert result["decoders_milliseconds"]["same_pixels"] <= result["decoders_milliseconds"]["images"] == 4
    table = loader.table(result)
    assert table.count("| train |") == table.count("| val |") == 1 and "| read and decode |" in table


@pytest.mark.parametrize(("words", "message"), [("--data nowhere", "no folder nowhere"), ("--batch 7", "12 images")])
def test_bad_arguments_are_refused(
    words: str, message: str, loader: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr("sys.argv", ["loader.py", "--data", str(folder), "--workers", "0", *words.split()])
    with pytest.raises(SystemExit) as stopped:
        loader.main()
    assert message in capsys.readouterr().err + str(stopped.value.code)
