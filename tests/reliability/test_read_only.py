"""Folders that cannot be written to: data is read all the same; what must be written is refused in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .._processes import REPOSITORY, read_only, without_write_permission

Forbid = Callable[[Path], list[str]]


@pytest.fixture(params=[read_only, without_write_permission])
def forbid(request: pytest.FixtureRequest) -> Forbid:
    """forbid(folder): the start of a command line that cannot write to `folder`."""

    def start(folder: Path) -> list[str]:
        command = request.param(folder)
        if command is None:
            pytest.skip(f"{request.param.__name__}: not permitted here")
        return command

    return start


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=300)


def train(*settings: object, config: object = "configs/digits/vanilla.yaml") -> list[str]:
    """The command of a run of one epoch."""
    common = ["EXPERIMENT.DEVICE", "cpu", "SOLVER.EPOCHS", "1", "SOLVER.LR_DECAY_STAGES", "[]", "LOG.WANDB", "False"]
    opts = [*common, *map(str, settings)]
    return [sys.executable, "tools/train.py", "--cfg", str(config), *opts]


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines of stderr, without those of matplotlib, which names a folder of its own where it has none."""
    return [line for line in done.stderr.splitlines() if "atplotlib" not in line]


TINY = """
EXPERIMENT: {PROJECT: tiny, TAG: base}
DATASET: {TYPE: tiny_imagenet}
DISTILLER: {TYPE: NONE, STUDENT: ShuffleV2}
SOLVER: {BATCH_SIZE: 50, LR: 0.01}
"""


def make_tiny(root: Path) -> None:
    """A Tiny-ImageNet of one training image a class, and of two to validate on."""
    home, noise = root / "tiny-imagenet-200", np.random.default_rng(0)
    names = [f"n{i:08}" for i in range(200)]
    annotations = "".join(f"val_{i}.JPEG\t{names[i]}\t0\t0\t9\t9\n" for i in range(2))
    images = [f"train/{name}/images/{name}_0.JPEG" for name in names] + [f"val/images/val_{i}.JPEG" for i in range(2)]
    for image in images:
        (home / image).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(home / image)
    (home / "wnids.txt").write_text("\n".join(names) + "\n")
    (home / "val" / "val_annotations.txt").write_text(annotations)


def test_tiny_imagenet_trains_from_a_folder_that_cannot_be_written_to(forbid: Forbid, tmp_path: Path) -> None:
    make_tiny(tmp_path / "data")
    (tmp_path / "tiny.yaml").write_text(TINY)
    places = ["DATASET.ROOT", tmp_path / "data", "LOG.PREFIX", tmp_path / "out"]
    done = run(forbid(tmp_path / "data") + train(*places, config=tmp_path / "tiny.yaml"))
    assert done.returncode == 0, done.stderr
    home = tmp_path / "data" / "tiny-imagenet-200"
    unwritten = [line for line in errors(done) if "cannot be written" in line]
    notes = [line for line in errors(done) if line.startswith("note: ")]  # warnings are of how few images there are
    assert len(unwritten) == 2 and len(notes) == 4, done.stderr
    for line, part in zip(unwritten, ("train", "val")):
        assert line.startswith(f"note: {home / part}.npz cannot be written (")
        assert line.endswith("); the images are decoded again by the next run")
    assert sorted(p.name for p in home.iterdir()) == ["train", "val", "wnids.txt"]


READ = """
import sys
from pathlib import Path
import pytest
from tests.dataset.test_cifar100 import make_cifar
from torchvision.datasets import CIFAR100
from mdistiller.console import tool
from mdistiller.dataset import get_dataloaders

root, patch = Path(sys.argv[1]), pytest.MonkeyPatch()
patch.setattr(CIFAR100, "url", "http://127.0.0.1:9/nobody-listens.tar.gz")
if sys.argv[2:] == ["make"]:
    make_cifar(root, patch)
else:
    make_cifar(Path(sys.argv[2]), patch)  # the same sums
    with tool():
        print(get_dataloaders("cifar100", 8, 8, 0, str(root))[2])
"""


@pytest.mark.parametrize("there", [True, False])
def test_cifar_is_read_or_missed_in_one_line(there: bool, forbid: Forbid, tmp_path: Path) -> None:
    command, data = [sys.executable, "-c", READ], tmp_path / "data"
    data.mkdir()
    if there:
        run([*command, str(data), "make"])
    done = run([*forbid(data), *command, str(data), str(tmp_path / "other")])
    if there:
        assert (done.returncode, done.stdout, done.stderr) == (0, "20\n", "")
    else:
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith(f"error: CIFAR-100 is expected in {data / 'cifar-100-python'}")


UNPACK = """
import sys
from pathlib import Path
from mdistiller.dataset.archives import unpack
try:
    unpack(Path(sys.argv[1]) / "a.tgz", Path(sys.argv[1]) / "set", ["one", "two"])
except OSError as error:
    print(error.strerror)
"""


def test_an_archive_is_not_unpacked_where_nothing_can_be_written(forbid: Forbid, tmp_path: Path) -> None:
    from ..dataset.test_archives import pack

    data = tmp_path / "data"
    data.mkdir()
    pack(data / "a.tgz")
    done = run([*forbid(data), sys.executable, "-c", UNPACK, str(data)])
    assert done.stdout in ("Read-only file system\n", "Permission denied\n"), done.stderr


def test_a_log_folder_that_cannot_be_written_to_is_one_line(forbid: Forbid, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    done = run(forbid(tmp_path / "out") + train("LOG.PREFIX", tmp_path / "out"))
    assert done.returncode == 2 and len(errors(done)) == 1, done.stderr
    assert errors(done)[0].startswith(f"error: cannot write to {tmp_path / 'out'}/digits/")
    assert errors(done)[0].endswith("set LOG.PREFIX to another folder")


@pytest.mark.slow
def test_a_home_that_cannot_be_written_to_changes_nothing(forbid: Forbid, tmp_path: Path) -> None:
    """With wandb, whose service prints its log on the terminal where it has no folder for it."""
    (tmp_path / "home").mkdir()
    settings = ["LOG.PREFIX", tmp_path / "out", "DATASET.TRAIN_FRACTION", "0.1", "LOG.WANDB", "True"]
    home = {"HOME": str(tmp_path / "home"), "WANDB_MODE": "offline"}
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "TORCH_HOME"):
        home[name] = str(tmp_path / "home" / name)
    done = run(forbid(tmp_path / "home") + train(*settings), **home)
    said = [line for line in errors(done) if not line.startswith("note: LOG.WANDB is given 2 times")]
    assert done.returncode == 0 and said == [], done.stderr
    (folder,) = (tmp_path / "out" / "digits").iterdir()
    assert (folder / "curves.png").exists() and list((folder / "wandb").glob("offline-run-*"))


@pytest.mark.slow
def test_a_teacher_s_cache_that_cannot_be_written_to(forbid: Forbid, tmp_path: Path) -> None:
    """An empty one is refused, a filled one is read, and the run ends with the same accuracy."""
    small = ["DATASET.TRAIN_FRACTION", "0.1", "LOG.PREFIX", tmp_path / "out"]
    assert run(train(*small)).returncode == 0
    (weights,) = (tmp_path / "out").glob("*/*/student_best")
    (tmp_path / "cache").mkdir()
    cached = [*small, "DISTILLER.TEACHER", "resnet8", "DISTILLER.TEACHER_CKPT", weights]
    cached += ["DISTILLER.TEACHER_CACHE", tmp_path / "cache"]
    config = "configs/digits/kd.yaml"
    refused = run(forbid(tmp_path / "cache") + train(*cached, "EXPERIMENT.NAME", "refused", config=config))
    assert refused.returncode == 2 and len(errors(refused)) == 1, refused.stderr
    assert "name another folder in DISTILLER.TEACHER_CACHE" in errors(refused)[0]
    (tmp_path / "cache").chmod(0o755)
    filled = run(train(*cached, "EXPERIMENT.NAME", "filled", config=config))
    for path in (tmp_path / "cache").iterdir():
        path.chmod(0o444)
    before = {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    read = run(forbid(tmp_path / "cache") + train(*cached, "EXPERIMENT.NAME", "read", config=config))
    assert (filled.returncode, read.returncode) == (0, 0), read.stderr
    note = f"note: the teacher's cache in {tmp_path / 'cache'} is read-only; what this run adds to it is kept in "
    assert errors(read) == [f"{note}memory alone"]
    assert filled.stdout.splitlines()[-1].split("->")[0] == read.stdout.splitlines()[-1].split("->")[0]
    assert {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == before
