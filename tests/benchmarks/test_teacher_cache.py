"""The benchmark of the teacher's cache runs, on noise in place of CIFAR-100."""

import pytest
import torch

from mdistiller.dataset import ImageArray, dataset_dict
from mdistiller.models import build_model, cifar_model_dict

from ._scripts import script

pytestmark = pytest.mark.slow


def test_a_small_comparison(monkeypatch, tmp_path):
    images = torch.randint(0, 256, (200, 32, 32, 3), dtype=torch.uint8)
    data = ImageArray(images, torch.arange(200) % 100, (0.5,) * 3, (0.25,) * 3)
    info = dataset_dict["cifar100"]
    monkeypatch.setitem(dataset_dict, "cifar100", type(info)(100, 32, "cifar", lambda *_: data))
    torch.save({"model": build_model(cifar_model_dict, "resnet8", 100).state_dict()}, tmp_path / "teacher")
    words = f"--data . --teacher {tmp_path}/teacher --pair resnet8-resnet8 --fraction 1 --rounds 1 --device cpu"
    with script("teacher_cache") as benchmark:
        monkeypatch.setattr(benchmark, "REPEATS", 1)
        table = benchmark.measure(benchmark.parse(words.split()))
    _, _, *rows = [line.split(" | ") for line in table.strip("|").splitlines()]
    assert [row[:2] for row in rows] == [
        ["| step", "no cache"], ["| step", "host"], ["| step", "device"], ["| look-up", "host"],
        ["| look-up", "device"], ["| fill", "host"], ["| fill", "device"],
    ]  # fmt: skip
    assert all(float(row[2].split()[0]) > 0 for row in rows)
    assert rows[1][3] == rows[3][3] == rows[5][3] == "1 (1-1) |"
