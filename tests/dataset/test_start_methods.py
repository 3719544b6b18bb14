"""Loader workers that do not begin as a copy of their process: `spawn`, which is Windows's and macOS's way."""

import subprocess
import sys

import pytest

from .._processes import REPOSITORY

SCRIPT = """
import sys
import numpy as np
import torch
from PIL import Image
from mdistiller.dataset.folders import ImageFiles
from mdistiller.dataset.imagenet import MEAN, STD, train_view, val_view

if __name__ == "__main__":
    torch.multiprocessing.set_start_method(sys.argv[1])
    files = [(f"{i}.png", i % 2) for i in range(6)]
    for name, label in files:
        Image.fromarray(np.full((40, 48, 3), 40 * label, np.uint8)).save(name)
    data = ImageFiles.of(files, train_view, val_view, MEAN, STD)
    passes = [list(data.loader(4, workers, train=True)) for workers in (0, 1)]
    assert all(torch.equal(a, b) for here, there in zip(*passes) for a, b in zip(here, there))
    print("the same")
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_are_not_forked_read_the_same_batches(tmp_path, method):
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, "script.py", method]
    environment = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "the same\n"), done.stderr
